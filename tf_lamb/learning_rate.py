"""The learning rate as an argument: a number, a schedule, a callable or a variable."""

import inspect
import math
import types
from typing import Any

import keras
import numpy as np

from tf_lamb.arguments import as_number


def is_variable(rate) -> bool:
    """Whether it can be assigned: a `tf.Variable`, or any backend's `keras.Variable`."""
    return hasattr(rate, "assign") and hasattr(rate, "dtype") and not isinstance(rate, float)


def _is_float_scalar(variable) -> bool:
    return variable.shape == () and "float" in keras.backend.standardize_dtype(variable.dtype)


def _takes_nothing(rate) -> bool:
    """Whether it can be called without arguments, which the other flavour's schedules cannot."""
    if not callable(rate) or isinstance(rate, type):
        return False
    try:
        inspect.signature(rate).bind()
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        pass
    return True


def _number(rate) -> float | None:
    """A Python float of anything that is one number in [0, ∞), or None."""
    number = as_number(rate)
    return float(number) if number is not None and 0 <= number < math.inf else None


def checked(rate, schedule_class):
    """Returns a number as a Python float, anything else that can be a rate as it is.

    Args:
        rate: what the user gave as `learning_rate`.
        schedule_class: the `LearningRateSchedule` of the optimizer's flavour.

    Raises:
        ValueError: it cannot be a rate.
    """
    if isinstance(rate, schedule_class):
        return rate
    if is_variable(rate):
        if _is_float_scalar(rate):
            return rate
    elif (number := _number(rate)) is not None:
        return number
    elif _takes_nothing(rate):
        return rate
    flavour = schedule_class.__module__.split(".")[0]
    raise ValueError(
        f"`learning_rate` must be a LearningRateSchedule of {flavour}, a callable without "
        "arguments, a scalar float variable, or a number in [0, inf). "
        f"Received: learning_rate={rate!r}."
    )


def settable(current, rate, schedule_class):
    """What `optimizer.learning_rate = rate` may assign: as `checked`.

    Args:
        current: what the optimizer was made with.
        rate: the new value: a number, a tensor, a schedule or a callable.
        schedule_class: the `LearningRateSchedule` of the optimizer's flavour.

    Raises:
        TypeError: the optimizer was made with a schedule or a callable, and a value cannot be
            assigned to that.
        ValueError: the value cannot be a rate.
    """
    if callable(rate) and not is_variable(rate):
        return checked(rate, schedule_class)
    if not is_variable(current):
        raise TypeError(NOT_ASSIGNABLE.format(rate))
    if is_variable(rate):
        return rate
    if _number(rate) is None and not _is_symbolic(rate):
        raise ValueError(
            f"`learning_rate` must be a number in [0, inf). Received: learning_rate={rate!r}."
        )
    return rate


def _is_symbolic(rate) -> bool:
    """Whether it is a tensor inside a compiled function, whose value is not known yet."""
    return hasattr(rate, "dtype") and hasattr(rate, "shape") and as_number(rate) is None


NOT_ASSIGNABLE = (
    "The optimizer was made with a schedule or a callable as `learning_rate`, and a value "
    "cannot be assigned to that. Create it with a number or a variable, or set another "
    "schedule or callable. Received: learning_rate={!r}."
)


class FixedRate(float):
    """The present rate of a schedule or callable, for the callbacks of tf_keras.

    They assign `optimizer.lr` without looking at it. On a number that is an `AttributeError`; here
    it is a `TypeError` that says why.
    """

    dtype: Any = np.dtype("float32")

    def assign(self, rate):
        """Not supported.

        Raises:
            TypeError: always.
        """
        raise TypeError(NOT_ASSIGNABLE.format(rate))


def check_savable(rate) -> None:
    """Raises `ValueError` for a callable of which a file could hold no more than a name."""
    has_form = isinstance(rate, types.FunctionType) or hasattr(rate, "get_config")
    if not is_variable(rate) and not has_form:
        raise ValueError(
            "`learning_rate` is a callable that cannot be saved. Use a schedule, a variable, or a "
            "function registered with `keras.saving.register_keras_serializable` (for tf_keras: "
            f"`tf_keras.utils.register_keras_serializable`). Received: learning_rate={rate!r}."
        )


def value(variable) -> float:
    """What the variable holds now."""
    return float(keras.ops.convert_to_numpy(variable))


def shown(rate) -> Any:
    """What `repr` shows of it: that must work for what cannot be saved, too."""
    if is_variable(rate):
        # The shortest decimal that is this float32: 0.1, not 0.10000000149011612.
        return float(str(np.float32(value(rate))))
    if hasattr(rate, "get_config"):
        return {"class_name": type(rate).__name__, "config": rate.get_config()}
    return rate
