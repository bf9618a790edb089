"""Writes an export: a SavedModel that takes raw data, its model card, weights for tf-models."""

import dataclasses
import os
import subprocess
import sys

import tensorflow as tf

from export import weights as tf_models_weights
from inputs.errors import InputError
from inputs.storage import files
from inputs.storage.files import atomic_folder, check_writable, write_json
from inputs.text.tokenization.casing import TOKENIZER
from inputs.text.tokenization.vocabulary import save_vocabulary

SAVED_MODEL = "saved_model.pb"  # without this file, a folder is not a SavedModel
CARD = "model_card.md"
WEIGHTS = "tf_models"
CLIENT_SECONDS = 600  # the client starts in seconds; a busy machine takes a minute


class ClientFailed(Exception):
    """The client did not run to its end. The message says how it ended."""


@dataclasses.dataclass(frozen=True)
class Export:
    """The parts of an export, for `write_export`.

    Attributes:
        module: contains the weights and the tables of the signatures.
        signatures: name -> `tf.function` of the module.
        encoder: the BERT encoder, or None. Its weights are also written to the folder tf_models,
            as an `init_checkpoint` for tf-models' `BertEncoder`.
        vocabulary: word pieces of the encoder; None without an encoder.
        lower_case: whether the encoder's text is lower-cased, or None.
    """

    module: tf.Module
    signatures: dict
    encoder: tf.Module | None = None
    vocabulary: list[str] | None = None
    lower_case: bool | None = None


def check_export_dir(export_dir: str, model_dir: str) -> None:
    """Checks that an export can be written, and would replace nothing but an older SavedModel.

    Args:
        export_dir: the folder to write.
        model_dir: the run's folder, which must not be in `export_dir`.

    Raises:
        InputError: the folder contains something else, or cannot be written.
    """
    inner, outer = (
        files.absolute(path) if files.is_remote(path) else os.path.realpath(path)
        for path in (model_dir, export_dir)
    )
    if f"{inner}/".startswith(f"{outer.rstrip('/')}/"):
        raise InputError(
            f"--export_dir: {export_dir} contains --model_dir, and an export replaces the folder. "
            "Choose a separate folder."
        )
    if not files.is_remote(export_dir) and os.path.ismount(outer):
        raise InputError(
            f"--export_dir: {export_dir} is a mount point, which an export cannot replace. Choose "
            "a folder in it."
        )
    check_writable(files.parent(export_dir), "--export_dir")
    # An export whose move was interrupted has no SAVED_MODEL until it is recovered.
    if not files.can_recover(export_dir):
        check_not_occupied(export_dir)


def check_not_occupied(export_dir: str) -> None:
    """Raises `InputError` if the folder contains something else than a SavedModel."""
    occupied = files.is_file(export_dir) or (
        files.is_folder(export_dir)
        and files.list_names(export_dir)
        and not files.exists(os.path.join(export_dir, SAVED_MODEL))
    )
    if occupied:
        raise InputError(
            f"--export_dir: {export_dir} exists and is not a SavedModel. Choose another folder."
        )


def write_export(export: Export, card: str, export_dir: str) -> None:
    """Writes an export. An older one is replaced only when the new one is complete.

    Args:
        export: what to write.
        card: text of the model card, written as model_card.md.
        export_dir: the folder, checked by `check_export_dir`.
    """
    with atomic_folder(export_dir, last=SAVED_MODEL) as fresh:
        tf.saved_model.save(export.module, fresh, signatures=export.signatures)
        if export.encoder is not None:
            weights = os.path.join(fresh, WEIGHTS)
            tf_models_weights.save_encoder(export.encoder, weights)
            save_vocabulary(export.vocabulary, os.path.join(weights, "vocab.txt"))
            write_json(os.path.join(weights, TOKENIZER), {"do_lower_case": export.lower_case})
        with open(os.path.join(fresh, CARD), "w", encoding="utf-8") as file:
            # Names of files that the locale cannot decode keep their bytes, if these are UTF-8.
            file.write(card.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def run_client(export_dir: str, *inputs: str) -> None:
    """Runs `python -m export.client` in a separate process, on the CPU.

    Args:
        export_dir: folder of the SavedModel.
        inputs: the inputs of the model, as `export.client` takes them.

    Raises:
        ClientFailed: the client could not be started, failed, or did not end.
    """
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    arguments = [files.absolute(export_dir), *inputs]
    # The training process may hold all memory of the GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    try:
        for argument in arguments:
            os.fsencode(argument)
    except UnicodeEncodeError:  # the locale's encoding lacks a character of the text
        arguments = [argument.encode("utf-8", "surrogateescape") for argument in arguments]
        environment["PYTHONUTF8"] = "1"  # the client ignores the locale, except for its output
        environment["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    command = [sys.executable, "-m", "export.client", *arguments]
    try:
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=CLIENT_SECONDS)
    except subprocess.CalledProcessError as error:
        raise ClientFailed(f"it ended with exit status {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise ClientFailed(f"it did not end within {CLIENT_SECONDS} s") from None
    except OSError as error:
        raise ClientFailed(f"it could not be started: {error.strerror}") from None
