"""What LAMB and LARS share in every Keras flavour: arguments, exclusions, layers, config."""

import dataclasses
import difflib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from keras import ops

from tf_lamb import updates

# What a Keras optimizer takes besides its rule's own arguments, in one flavour or the other.
KERAS_ARGUMENTS = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "jit_compile",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What was decided for one variable when the optimizer was built.

    name: its full path, `"encoder/dense/kernel"`, without TensorFlow's `:0`.
    shape: its static shape.
    decayed: whether weight decay enters its update.
    adapted: whether its step is scaled by a trust ratio.
    """

    name: str
    shape: tuple[int, ...]
    decayed: bool
    adapted: bool


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """The constructor's patterns; `adaptation=None` means "the same as `decay`"."""

    decay: tuple[str, ...]
    adaptation: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything `build` makes. It is no list and no tuple: Keras would track it as state, and
    write the model's variables and each slot a second time into every checkpoint."""

    layers: tuple[Layer, ...]
    slots: tuple[Sequence[Any], ...]
    run: Callable | None = None


def check_interval(name: str, value, low: float, high: float = math.inf, *, open_low=False) -> None:
    """Raises `ValueError` unless `value` is a number in [low, high), or (low, high) if open_low."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value < high:
        interval = f"{'(' if open_low else '['}{low:g}, {high:g})"
        raise ValueError(f"`{name}` must be a number in {interval}. Received: {name}={value!r}.")


def check_patterns(name: str, patterns) -> tuple[str, ...]:
    """Returns the patterns as a tuple; `ValueError` for one that is no regular expression."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Iterable):
        raise ValueError(
            f"`{name}` must be a list of regular expressions. Received: {name}={patterns!r}."
        )
    patterns = tuple(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`{name}` must hold regular expressions, searched in each variable's full path "
                f"(escape special characters with a backslash). Received: {pattern!r} ({error})."
            ) from None
    return patterns


def plan_layers(names, shapes, no_decay, no_adaptation) -> tuple[Layer, ...]:
    """Matches the exclusion patterns against the variables' paths, once.

    Raises:
        ValueError: a pattern matches no variable; the message lists the names there are.
    """
    for pattern in dict.fromkeys((*no_decay, *no_adaptation)):
        if not any(re.search(pattern, name) for name in names):
            listed = "\n  ".join(names)
            raise ValueError(
                f"Every exclusion pattern must match a variable. Received: {pattern!r}, which "
                f"matches none of the {len(names)} variables. Correct it or take it out of "
                f"`exclude_from_weight_decay` / `exclude_from_layer_adaptation`; the names "
                f"are:\n  {listed}"
            )

    def excluded(name, patterns):
        return any(re.search(pattern, name) for pattern in patterns)

    return tuple(
        Layer(name, tuple(shape), not excluded(name, no_decay), not excluded(name, no_adaptation))
        for name, shape in zip(names, shapes, strict=True)
    )


class Layerwise:
    """The part of an optimizer that neither flavour of Keras and neither rule changes.

    A rule (`lamb.LAMBRule`, `lars.LARSRule`) stands before it and gives `slot_names` and
    `_new_values`; an adapter (`keras3.Adapter`, `tf_keras.Adapter`) stands behind it, is a Keras
    optimizer, and calls `_updated` from the one hook that runs after the gradients were summed.
    """

    slot_names: tuple[str, ...]

    def __init__(
        self,
        learning_rate,
        *,
        weight_decay,
        exclude_from_weight_decay,
        exclude_from_layer_adaptation,
        name,
        **keras_arguments,
    ):
        if isinstance(learning_rate, numbers.Real):
            check_interval("learning_rate", learning_rate, 0, open_low=True)
            learning_rate = float(learning_rate)
        check_interval("weight_decay", weight_decay, 0)
        for unknown in keras_arguments.keys() - self._keras_arguments():
            known = [*inspect.signature(type(self).__init__).parameters, *self._keras_arguments()]
            nearest = difflib.get_close_matches(unknown, known, n=1)
            hint = f"Did you mean `{nearest[0]}`? " if nearest else ""
            raise ValueError(
                f"`{type(self).__name__}` takes no argument `{unknown}`. {hint}"
                f"Received: {unknown}={keras_arguments[unknown]!r}."
            )
        clips = {
            key: keras_arguments[key]
            for key in ("clipnorm", "clipvalue", "global_clipnorm")
            if keras_arguments.get(key) is not None
        }
        if len(clips) > 1:
            raise ValueError(
                "Set only one of `clipnorm`, `clipvalue` and `global_clipnorm`. Received: "
                + ", ".join(f"{key}={value}" for key, value in clips.items())
            )
        for key, value in clips.items():
            check_interval(key, value, 0, open_low=True)
        excluded = Exclusions(
            check_patterns("exclude_from_weight_decay", exclude_from_weight_decay),
            None
            if exclude_from_layer_adaptation is None
            else check_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation),
        )
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **keras_arguments)
        self._plan = None
        # The base classes own the name `exclude_from_weight_decay`, for a method.
        self._excluded = excluded

    @classmethod
    def _keras_arguments(cls) -> set[str]:
        """Names of the arguments that every optimizer of this Keras flavour takes."""
        known: set[str] = set()
        for base in cls.__mro__:
            if "__init__" in vars(base):
                known.update(inspect.signature(base.__init__).parameters)
        return known.intersection(KERAS_ARGUMENTS)

    def _planned(self, names, shapes) -> tuple[Layer, ...]:
        decay, adaptation = self._excluded.decay, self._excluded.adaptation
        return plan_layers(names, shapes, decay, decay if adaptation is None else adaptation)

    def _updated(self, index, grads, params, slots, learning_rate, step):
        """New values of the variables at `index` and of their slots: `(params, *slots)`.

        Args:
            index: tuple of Python ints, positions of the variables that have a gradient.
            grads: list of float tensors, summed over the replicas, one per position.
            params: list of float tensors, the variables' values.
            slots: one list of float32 tensors per name in `slot_names`.
            learning_rate, step: float32 scalars; `step` is 1 in the first update.
        """
        layers = [self._plan.layers[i] for i in index]
        grads = updates.clip(
            [ops.cast(g, "float32") for g in grads],
            self.clipvalue,
            self.clipnorm,
            self.global_clipnorm,
        )
        return self._new_values(
            grads,
            params,
            slots,
            learning_rate=learning_rate,
            step=step,
            decay=tuple(layer.decayed for layer in layers),
            adapt=tuple(layer.adapted for layer in layers),
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What was decided for each variable, in the order the optimizer was built with."""
        if self._plan is None:
            raise ValueError(
                "The layers are known once the optimizer is built. Call "
                "`optimizer.build(model.trainable_variables)` first."
            )
        return self._plan.layers

    def layer_table(self, print_fn: Callable[[str], object] = print) -> None:
        """Prints name, shape, and whether it is decayed and adapted, for each variable."""
        rows = [("variable", "shape", "decayed", "adapted")]
        for layer in self.layers:
            marks = ("yes" if flag else "-" for flag in (layer.decayed, layer.adapted))
            rows.append((layer.name, str(layer.shape), *marks))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            print_fn("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Refused: what this Keras method sets is lost when the optimizer is saved."""
        raise RuntimeError(
            "Exclusions are constructor data here, so that they are saved with the optimizer. "
            f"Write {type(self).__name__}(..., exclude_from_weight_decay=[patterns]). "
            f"Received: var_list={var_list}, var_names={var_names}."
        )

    def update_step(self, *unused_args, **unused_kwargs):
        """Refused: the whole model is updated at once, never one variable alone."""
        raise RuntimeError(
            f"{type(self).__name__} updates the whole model in one program. "
            "Call `optimizer.apply_gradients(grads_and_vars)`."
        )

    def _apply_weight_decay(self, variables):
        """Nothing: decay belongs inside the trust ratio, and the base would add it outside."""

    def _clip_gradients(self, grads):
        """Nothing: Keras 3 clips before the sum over replicas; `updates.clip` runs after it."""
        return grads

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, exclusions included, as plain Python values."""
        adaptation = self._excluded.adaptation
        config = super().get_config() | {
            "exclude_from_weight_decay": list(self._excluded.decay),
            "exclude_from_layer_adaptation": None if adaptation is None else list(adaptation),
        }
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name not in config and name != "self" and parameter.kind != parameter.VAR_KEYWORD:
                config[name] = getattr(self, name)
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The optimizer that `get_config` described, without its state."""
        rate = config.get("learning_rate")
        if isinstance(rate, numbers.Real) and rate == 0:
            # A rate that a callback drove to 0 is no valid argument, but a valid state.
            optimizer = super().from_config(config | {"learning_rate": 1.0}, custom_objects)
            optimizer.learning_rate = 0.0
            return optimizer
        return super().from_config(dict(config), custom_objects)
