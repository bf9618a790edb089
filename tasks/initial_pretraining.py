"""Weights and moments from which a pre-training run starts.

Three layouts are read:

- a run of train.py (the encoder, both heads, and the two moments of LAMB);
- a TensorFlow 1 checkpoint of google-research/bert or of MLPerf (`bert/...` and `cls/...`, with the
  moments of LAMB or AdamW beside each weight);
- a checkpoint in tf-models' layout, such as the published TF 2 ones and those of
  `tf2_bert_encoder_checkpoint_converter`. They have no moments, and may have no heads.
"""

import dataclasses
import os
import re

import numpy as np

from inputs.errors import InputError
from inputs.storage.files import exists, read_json
from tasks import initial_weights
from tasks.initial_weights import VALUE

# Of a name in the model without its first part -> the name in a TensorFlow 1 checkpoint.
TF1_NAMES = (
    (r"^word_embeddings/embeddings$", "bert/embeddings/word_embeddings"),
    (r"^position_embedding/embeddings$", "bert/embeddings/position_embeddings"),
    (r"^type_embeddings/embeddings$", "bert/embeddings/token_type_embeddings"),
    (r"^embeddings/layer_norm/", "bert/embeddings/LayerNorm/"),
    (r"^transformer/", "bert/encoder/"),
    (r"/self_attention_layer_norm/", "/attention/output/LayerNorm/"),
    (r"/output_layer_norm/", "/output/LayerNorm/"),
    (r"/self_attention/attention_output/", "/attention/output/dense/"),
    (r"/self_attention/", "/attention/self/"),
    (r"/intermediate/", "/intermediate/dense/"),
    (r"(layer_\d+)/output/(kernel|bias)$", r"\1/output/dense/\2"),
    (r"^pooler_transform/", "bert/pooler/dense/"),
    (r"^masked_lm/output_bias/bias$", "cls/predictions/output_bias"),
    (r"^masked_lm/", "cls/predictions/"),
    (r"^next_sentence/kernel$", "cls/seq_relationship/output_weights"),
    (r"^next_sentence/bias$", "cls/seq_relationship/output_bias"),
)
TRANSPOSED = "cls/seq_relationship/output_weights"  # [2, H] in TensorFlow 1
TF1_WORDS = "bert/embeddings/word_embeddings"
TF1_MOMENTS = (("/LAMB", "/LAMB_1"), ("/adam_m", "/adam_v"))  # of LAMB, and of AdamW
HEADS = {  # in the model -> in a TensorFlow 2 checkpoint, after the path of the masked-LM head
    "masked_lm/output_bias/bias": "output_bias.Sbias",
    "masked_lm/transform/dense/kernel": "dense/kernel",
    "masked_lm/transform/dense/bias": "dense/bias",
    "masked_lm/transform/LayerNorm/gamma": "layer_norm/gamma",
    "masked_lm/transform/LayerNorm/beta": "layer_norm/beta",
}


@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of LAMB: the number of updates, and the two moments by name of their weight."""

    step: int
    moments: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def own_name(variable) -> str:
    """Returns a weight's name without the name of the encoder, which differs between models."""
    name = variable.name.split(":")[0]
    return re.sub(r"^bert_encoder[^/]*/", "", name)


def tf1_name(name: str) -> str:
    """Returns the name in a TensorFlow 1 checkpoint of a weight with this `own_name`."""
    for pattern, replacement in TF1_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def vocabulary_beside(init_from: str) -> str:
    """Returns the path of vocab.txt in the checkpoint's folder, or "" if there is none."""
    folder = os.path.dirname(initial_weights.find_checkpoint(init_from))
    path = os.path.join(folder, "vocab.txt")
    return path if exists(path) else ""


class Start:
    """A checkpoint from which pre-training starts.

    Args:
        init_from: a folder or a checkpoint's prefix.
        slots: whether its moments are wanted.

    Raises:
        InputError: there is no checkpoint, it is in none of the three layouts, or it has no moments
            although they are wanted.
    """

    def __init__(self, init_from: str, slots: bool):
        self.checkpoint = initial_weights.find_checkpoint(init_from)
        self._shapes = initial_weights.read_shapes(self.checkpoint)
        self._reader = initial_weights.open_checkpoint(self.checkpoint)
        self._wants_slots = slots
        self._encoder = None
        if TF1_WORDS not in self._shapes:
            self._encoder = initial_weights.find_encoder(init_from)
        if slots and not self._moment_keys():
            raise InputError(
                f"--set init_slots=true: {self.checkpoint} has no moments of LAMB. Leave "
                "init_slots out, or give a run of train.py with LAMB or a TensorFlow 1 checkpoint."
            )

    def assign(self, model) -> list[str]:
        """Assigns the weights of the model, and returns the names of those that it does not have.

        Raises:
            InputError: a weight has another shape, or the encoder is not complete.
        """
        variables = {own_name(variable): variable for variable in model.trainable_variables}
        missing = []
        values = self._tf2_values(variables) if self._encoder else None
        for name, variable in variables.items():
            value = (
                self._tf1_value(tf1_name(name), variable) if values is None else values.get(name)
            )
            if value is None:
                missing.append(name)
                continue
            if tuple(value.shape) != tuple(variable.shape):
                raise InputError(
                    f"--set init_from: {name} is {list(value.shape)} in {self.checkpoint} and "
                    f"{list(variable.shape)} in this run. Give the checkpoint's model, vocabulary "
                    "(--vocab) and max_sequence_length."
                )
            variable.assign(value)
        encoder = [name for name in missing if not re.match("masked_lm|next_sentence", name)]
        if encoder:
            raise InputError(
                f"--set init_from: {self.checkpoint} is not a complete BERT: {encoder[0]} is "
                f"missing, and {len(encoder) - 1} more weights of the encoder."
            )
        return missing

    def read_slots(self, model) -> Slots | None:
        """Returns the moments of the model's weights, or None if they are not wanted.

        Raises:
            InputError: some are missing or have another shape.
        """
        if not self._wants_slots:
            return None
        keys = self._moment_keys()
        moments: tuple[dict, dict] = ({}, {})
        for index, variable in enumerate(model.trainable_variables):
            name = own_name(variable)
            for k in range(2):
                if self._encoder:
                    # LAMB's variables in order: iterations, first moments, second moments.
                    key = f"{keys[0]}/{1 + index + k * len(model.trainable_variables)}{VALUE}"
                    value = self._reader.get_tensor(key) if key in self._shapes else None
                else:
                    value = self._tf1_value(tf1_name(name) + keys[k], variable)
                if value is None or tuple(value.shape) != tuple(variable.shape):
                    raise InputError(
                        f"--set init_slots=true: {self.checkpoint} lacks the two moments of "
                        f"{name} with shape {list(variable.shape)}. Leave init_slots out."
                    )
                moments[k][name] = value
        step_key = f"optimizer/_iterations{VALUE}" if self._encoder else "global_step"
        if step_key not in self._shapes:
            raise InputError(
                f"--set init_slots=true: {self.checkpoint} has no {step_key}, the number of "
                "updates of its moments. Leave init_slots out."
            )
        return Slots(int(self._reader.get_tensor(step_key)), moments)

    def _moment_keys(self) -> tuple[str, ...]:
        """The ends of the keys of both moments, or the start of those of a run; () if none."""
        if self._encoder:
            # Adam of tf_keras has its moments in another order.
            path = os.path.join(os.path.dirname(self.checkpoint), "recipe.json")
            try:
                lamb = read_json(path).get("optimizer") == "lamb"
            except (InputError, AttributeError):
                lamb = False
            return ("optimizer/_variables",) if lamb else ()
        found = (
            keys for keys in TF1_MOMENTS if all(TF1_WORDS + key in self._shapes for key in keys)
        )
        return next(found, ())

    def _tf1_value(self, key: str, variable):
        """A weight or moment of a TensorFlow 1 checkpoint, in the shape of the model's weight.

        The attention's projections are matrices there, and have an axis of heads here.
        """
        if key not in self._shapes:
            return None
        value = self._reader.get_tensor(key)
        if key.startswith(TRANSPOSED):
            value = value.T
        if value.size == np.prod(variable.shape) and "attention" in key:
            value = value.reshape(variable.shape)
        return value

    def _tf2_values(self, variables) -> dict[str, np.ndarray]:
        """The weights of a TensorFlow 2 checkpoint by their `own_name`."""
        values = initial_weights.read_encoder(self._encoder)
        end = f"/output_bias.Sbias{VALUE}"
        heads = [k.removesuffix(end) for k in self._shapes if k.endswith(end)]
        if len(heads) == 1:
            keys = {name: f"{heads[0]}/{end}{VALUE}" for name, end in HEADS.items()}
            values |= {n: self._reader.get_tensor(k) for n, k in keys.items() if k in self._shapes}
        sentence = "next_sentence/kernel"
        shape = list(variables[sentence].shape)
        pairs = [
            key.removesuffix(f"/kernel{VALUE}")
            for key, found in self._shapes.items()
            if found == shape and key.endswith(f"/kernel{VALUE}")
        ]
        if len(pairs) == 1:
            for part in ("kernel", "bias"):
                key = f"{pairs[0]}/{part}{VALUE}"
                values[f"next_sentence/{part}"] = self._reader.get_tensor(key)
        return values
