"""The `learning_rate` argument: a number, a schedule, a callable or a variable."""

import inspect
import math
import types
from typing import Any

import keras
import numpy as np

from tf_lamb.arguments import as_number


def is_variable(rate) -> bool:
    """Returns whether `rate` is a `tf.Variable`, or a `keras.Variable` of any backend."""
    return hasattr(rate, "assign") and hasattr(rate, "dtype") and not isinstance(rate, float)


def check_learning_rate(rate, schedule_class):
    """Returns a number as a Python float, and any other valid learning rate unchanged.

    Args:
        rate: The `learning_rate` argument of a constructor.
        schedule_class: The `LearningRateSchedule` class of the optimizer's version of Keras.

    Raises:
        ValueError: If `rate` cannot be a learning rate.
    """
    if isinstance(rate, schedule_class):
        return rate
    if is_variable(rate):
        if _is_float_scalar(rate):
            return rate
    elif (number := _as_non_negative_float(rate)) is not None:
        return number
    elif _is_callable_without_arguments(rate):
        return rate
    flavor = schedule_class.__module__.split(".")[0]
    raise ValueError(
        f"`learning_rate` must be a LearningRateSchedule of {flavor}, a callable without "
        "arguments, a scalar float variable, or a number in [0, inf). "
        f"Received: learning_rate={rate!r}."
    )


def check_assigned_rate(current, rate, schedule_class):
    """Checks an assignment `optimizer.learning_rate = rate`.

    Args:
        current: The current learning rate of the optimizer: a variable, schedule or callable.
        rate: The assigned value: a number, tensor, variable, schedule or callable.
        schedule_class: The `LearningRateSchedule` class of the optimizer's version of Keras.

    Returns:
        The value to assign.

    Raises:
        TypeError: If a value is assigned although the current rate is a schedule or a callable.
        ValueError: If `rate` cannot be a learning rate.
    """
    if callable(rate) and not is_variable(rate):
        return check_learning_rate(rate, schedule_class)
    if not is_variable(current):
        raise TypeError(NOT_ASSIGNABLE.format(rate))
    if is_variable(rate):
        return rate
    if _as_non_negative_float(rate) is None and not _is_symbolic(rate):
        raise ValueError(
            f"`learning_rate` must be a number in [0, inf). Received: learning_rate={rate!r}."
        )
    return rate


def _is_float_scalar(variable) -> bool:
    return variable.shape == () and "float" in keras.backend.standardize_dtype(variable.dtype)


def _as_non_negative_float(rate) -> float | None:
    """Returns a finite number >= 0 as a Python float, and `None` for anything else."""
    number = as_number(rate)
    return float(number) if number is not None and 0 <= number < math.inf else None


def _is_callable_without_arguments(rate) -> bool:
    """Returns whether `rate` is callable without arguments, which a schedule is not."""
    if not callable(rate) or isinstance(rate, type):
        return False
    try:
        inspect.signature(rate).bind()
    except TypeError:
        return False
    except ValueError:  # Some built-in functions have no signature.
        pass
    return True


def _is_symbolic(rate) -> bool:
    """Returns whether `rate` is a tensor inside a compiled function, without a known value."""
    return hasattr(rate, "dtype") and hasattr(rate, "shape") and as_number(rate) is None


NOT_ASSIGNABLE = (
    "The optimizer was created with a schedule or a callable as `learning_rate`, so a value "
    "cannot be assigned to it. Create the optimizer with a number or a variable, or assign another "
    "schedule or callable. Received: learning_rate={!r}."
)


class ReadOnlyRate(float):
    """The current value of a schedule or callable, as `optimizer.lr` of tf_keras.

    Callbacks of tf_keras assign to `optimizer.lr` without checking its type. With a plain number,
    that raises an unhelpful `AttributeError`. This class raises a `TypeError` with the reason.
    """

    dtype: Any = np.dtype("float32")

    def assign(self, rate):
        """Not supported.

        Raises:
            TypeError: Always.
        """
        raise TypeError(NOT_ASSIGNABLE.format(rate))


def check_savable(rate) -> None:
    """Raises `ValueError` for a callable that cannot be restored from a saved configuration."""
    is_savable = isinstance(rate, types.FunctionType) or hasattr(rate, "get_config")
    if not is_variable(rate) and not is_savable:
        raise ValueError(
            "`learning_rate` is a callable that cannot be saved. Use a schedule, a variable, or a "
            "function registered with `keras.saving.register_keras_serializable` (for tf_keras: "
            f"`tf_keras.utils.register_keras_serializable`). Received: learning_rate={rate!r}."
        )


def to_float(variable) -> float:
    """Returns the current value of a variable as a Python float."""
    return float(keras.ops.convert_to_numpy(variable))


def to_repr(rate) -> Any:
    """Returns what `repr(optimizer)` shows for a learning rate. It need not be savable."""
    if is_variable(rate):
        # The shortest decimal that gives this float32: 0.1, not 0.10000000149011612.
        return float(str(np.float32(to_float(rate))))
    if hasattr(rate, "get_config"):
        return {"class_name": type(rate).__name__, "config": rate.get_config()}
    return rate
