"""An export: a SavedModel that takes raw data, its model card, and weights for tf-models."""

import dataclasses
import os
import subprocess
import sys

import tensorflow as tf

from export import weights as tf_models_weights
from inputs.errors import InputError
from inputs.files import atomic_folder, check_writable
from inputs.text.vocabulary import save_vocabulary

CARD, WEIGHTS = "model_card.md", "tf_models"


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written.

    module: holds the weights, the tokenizer and the vocabulary.
    signatures: name -> `tf.function` of the module.
    encoder: the BERT inside, if there is one: its weights are also written for tf-models'
        `BertEncoder` (its `init_checkpoint`), into the folder tf_models.
    vocabulary: its word pieces.
    """

    module: tf.Module
    signatures: dict
    encoder: tf.Module | None = None
    vocabulary: list[str] | None = None


def check_export_dir(export_dir: str, model_dir: str) -> None:
    """Raises `InputError` unless the SavedModel can be written there without loss.

    What an export may replace is an older SavedModel, and nothing else.
    """
    inner, outer = os.path.realpath(model_dir), os.path.realpath(export_dir)
    if os.path.commonpath([inner, outer]) == outer:
        raise InputError(
            f"--export_dir: {export_dir} holds --model_dir, and an export replaces the folder. "
            "Give a folder of its own."
        )
    kept = os.path.isfile(export_dir) or (
        os.path.isdir(export_dir)
        and os.listdir(export_dir)
        and not os.path.exists(os.path.join(export_dir, "saved_model.pb"))
    )
    if kept:
        raise InputError(
            f"--export_dir: {export_dir} exists and is no SavedModel. Choose another folder."
        )
    check_writable(os.path.dirname(os.path.abspath(export_dir)), "--export_dir")


def write_export(export: Export, card: str, export_dir: str) -> None:
    """Writes the SavedModel; an older one of that name is replaced when the new one is whole.

    Args:
        export: what to write.
        card: the model card's text, kept as model_card.md.
        export_dir: the folder; `check_export_dir` has said that it can be written.
    """
    with atomic_folder(export_dir) as fresh:
        tf.saved_model.save(export.module, fresh, signatures=export.signatures)
        if export.encoder is not None:
            weights = os.path.join(fresh, WEIGHTS)
            tf_models_weights.save_encoder(export.encoder, weights)
            save_vocabulary(export.vocabulary, os.path.join(weights, "vocab.txt"))
        with open(os.path.join(fresh, CARD), "w", encoding="utf-8") as file:
            file.write(card)


def run_apart(module: str, export_dir: str, *arguments: str) -> None:
    """Runs `python -m module export_dir arguments` in a process of its own, on the CPU.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", module, os.path.abspath(export_dir), *arguments]
    # This process may hold all memory of a GPU.
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run(command, cwd=folder, env=on_cpu, check=True)
