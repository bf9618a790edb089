"""Constructor arguments: checks, variants, and the names that other libraries use."""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published form of LAMB or LARS.

    Attributes:
        source: String. The paper or program that the variant is from, and how it differs from
            the default.
        arguments: Dictionary. The constructor arguments that differ from the defaults.
    """

    source: str
    arguments: dict[str, Any]


class Hyperparameters:
    """The checked constructor arguments of an optimizer, as read-only attributes."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.__dict__.update(arguments)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"There is no argument {name!r}.")

    def items(self) -> Iterable[tuple[str, Any]]:
        """Returns (name, value) pairs."""
        return self.__dict__.items()

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def key(self, excluding: Iterable[str]) -> str:
        """Returns a string that is equal for equal arguments, ignoring those in `excluding`."""
        return repr(sorted((k, v) for k, v in self.__dict__.items() if k not in excluding))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"Arguments are fixed when the optimizer is created, because compiled updates contain "
            f"them. Create another optimizer. Received: {name}={value!r}."
        )


def constructor_arguments(local_variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor as a dictionary.

    Args:
        local_variables: The result of `locals()` on the first line of the constructor.
    """
    not_arguments = ("self", "base_arguments", "__class__")
    return {name: value for name, value in local_variables.items() if name not in not_arguments}


# Maps argument names of other libraries' LAMB and LARS to the names in this package.
FOREIGN_NAMES = {
    "lr": "`learning_rate`",
    "eta": "`learning_rate`",
    "b1": "`beta_1`",
    "beta1": "`beta_1`",
    "b2": "`beta_2`",
    "beta2": "`beta_2`",
    "betas": "`beta_1` and `beta_2`",
    "eps": "`epsilon`",
    "decay": "`weight_decay`",
    "weight_decay_rate": "`weight_decay`",
    "weight_decouple": "not needed: weight decay is always applied inside the trust ratio",
    "adam_w_mode": "not needed: weight decay is always applied inside the trust ratio",
    "mask": "`exclude_from_weight_decay`",
    "weight_decay_mask": "`exclude_from_weight_decay`",
    "trust_ratio_mask": "`exclude_from_layer_adaptation`",
    "skip_list": "`exclude_from_layer_adaptation`",
    "eeta": "`trust_coefficient`",
    "trust_coeff": "`trust_coefficient`",
    "classic_momentum": '`form`: "tf-models" for True, "tf-models-scaled" for False',
    "use_nesterov": "`nesterov`",
    "max_grad_norm": "`global_clipnorm`",
    "clip_norm": "`clipnorm`",
    "pre_norm": "`unit_gradient`",
    "debias": "`bias_correction`",
    "trust_clip": "`trust_ratio_bounds=(0, 1)`",
    "max_coeff": "the second of `trust_ratio_bounds`",
    "min_coeff": "the first of `trust_ratio_bounds`",
    "clamp_value": "the second of `weight_norm_bounds`",
    "use_nvlamb": "`exclude_from_layer_adaptation=()`",
    "always_adapt": "`exclude_from_layer_adaptation=()`",
}


def as_number(value) -> float | int | None:
    """Converts a number, NumPy scalar or scalar tensor to a Python number.

    Returns `None` for anything else, including booleans and tensors without a known value.
    """
    if isinstance(value, bool) or isinstance(value, str) or value is None:
        return None
    if isinstance(value, numbers.Real):
        return value.item() if isinstance(value, np.generic) else value  # type: ignore
    if getattr(value, "shape", None) == () and not callable(value):
        try:
            number = np.asarray(value).item()
        except Exception:  # A tensor inside a compiled function; each backend raises its own error.
            return None
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        return number if is_number else None
    return None


def check_interval(
    name: str,
    value,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = True,
    whole: bool = False,
) -> Any:
    """Checks that an argument is a number in an interval.

    Args:
        name: String. The name of the argument, for the error message.
        value: The value of the argument.
        low: Float. The lower bound.
        high: Float. The upper bound.
        open_low: Boolean. Whether the lower bound is excluded.
        open_high: Boolean. Whether the upper bound is excluded.
        whole: Boolean. Whether the number must be an integer, such as a number of steps.

    Returns:
        The value as a Python number.

    Raises:
        ValueError: If the value is not a number in the interval, or not an integer if `whole`.
    """
    number = as_number(value)
    if whole and number is not None and math.isfinite(number):
        if number != int(number):
            raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}.")
        number = int(number)
    if number is None or not (
        (low < number if open_low else low <= number)
        and (number < high if open_high else number <= high)
    ):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"`{name}` must be a number in {interval}. Received: {name}={value!r}.")
    return number


def check_bounds(name: str, value) -> tuple[float, float] | None:
    """Checks that an argument is a pair of bounds.

    Args:
        name: String. The name of the argument, for the error message.
        value: The value of the argument.

    Returns:
        The bounds as a pair of Python numbers, or `None` if the value is `None`.

    Raises:
        ValueError: If the value is not a pair of numbers with 0 <= low < high.
    """
    if value is None:
        return None
    parts = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    bounds = [as_number(part) for part in parts]
    if len(bounds) != 2 or None in bounds or not 0 <= bounds[0] < bounds[1]:  # type: ignore
        raise ValueError(
            f"`{name}` must be (low, high) with 0 <= low < high. Received: {name}={value!r}."
        )
    return bounds[0], bounds[1]  # type: ignore


def check_flag(name: str, value) -> bool:
    """Checks that an argument is a Boolean, also as 0, 1 or a NumPy Boolean.

    Raises:
        ValueError: If it is anything else, such as the string `"no"`, which Python takes as true.
    """
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")


def check_choice(name: str, value, choices):
    """Returns the element of `choices` that equals `value`, which may be of another type.

    `np.dtype("float32")` equals `"float32"`, and cannot be saved.

    Raises:
        ValueError: If there is none.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(
        f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}."
    )


def check_patterns(name: str, patterns) -> tuple[str, ...]:
    """Checks that an argument is a list of regular expressions.

    Args:
        name: String. The name of the argument, for the error message.
        patterns: List of strings. A string is a single pattern, and `None` is an empty list.

    Returns:
        The patterns as a tuple of strings.

    Raises:
        ValueError: If an element is not a regular expression.
    """
    if patterns is None:
        return ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Iterable):
        raise ValueError(
            f"`{name}` must be a list of regular expressions. Received: {name}={patterns!r}."
        )
    patterns = tuple(patterns)
    for pattern in patterns:
        try:
            if not isinstance(pattern, str):
                raise TypeError("only strings can be saved")
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`{name}` must contain regular expressions, which are searched in each variable's "
                "full path (escape special characters with a backslash). "
                f"Received: {pattern!r} ({error})."
            ) from None
    return patterns


def check_axes(layer_axes) -> dict[str, tuple[int, ...]]:
    """Checks the argument `layer_axes`.

    Args:
        layer_axes: Dictionary {pattern: axis or list of axes}, or `None` for an empty one.

    Returns:
        A dictionary {pattern: tuple of axes}.

    Raises:
        ValueError: If it is not a dictionary from regular expressions to integers.
    """
    layer_axes = {} if layer_axes is None else layer_axes
    if not isinstance(layer_axes, Mapping):
        raise ValueError(
            "`layer_axes` must be a dictionary {pattern: axes along which layers are stacked}. "
            f"Received: layer_axes={layer_axes!r}."
        )
    check_patterns("layer_axes", layer_axes)
    axes = {}
    for pattern, value in layer_axes.items():
        values = value if isinstance(value, Iterable) else (value,)
        axes[pattern] = tuple(as_number(axis) for axis in values)
        if not all(isinstance(axis, int) for axis in axes[pattern]):
            raise ValueError(
                f"The axes in `layer_axes` must be integers. Received: layer_axes={layer_axes!r}."
            )
    return axes  # type: ignore


def to_json(value):
    """Converts tuples to lists and NumPy numbers to Python numbers, in dictionaries too."""
    if isinstance(value, tuple):
        return [to_json(element) for element in value]
    if isinstance(value, dict):
        return {key: to_json(element) for key, element in value.items()}
    return value.item() if hasattr(value, "item") else value
