"""Checks of what is given as arguments, in one place.

Every error is a ValueError that names the argument, what was required and what was got.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

from torch import nn

ROUNDING = 1e-12
"""Relative distance from a whole number that counts as rounding."""


def finite(name: str, value: object, requirement: str = "a finite number") -> float:
    """Returns `value` as a finite float.

    Args:
        name: the argument's name, as the user wrote it.
        value: what was given. Booleans, strings, tensors and None are not numbers here.
        requirement: what the error message says was required.

    Returns:
        The value as a float.

    Raises:
        ValueError: if the value is not a real number, or is NaN or infinite.
    """
    # bool is a subclass of int, but True is never meant as a learning rate or a batch size of one.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(
            f"Expected argument `{name}` to be {requirement},"
            f" but got {value!r} of type {type(value).__name__}."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"Expected argument `{name}` to be {requirement}, but got {value!r}.")
    return number


def positive(name: str, value: object) -> float:
    """Returns `value` as a finite float above zero, or raises a ValueError that names it."""
    return _where(lambda number: number > 0, name, value, "a finite number above 0")


def non_negative(name: str, value: object) -> float:
    """Returns `value` as a finite float of at least zero, or raises a ValueError that names it."""
    return _where(lambda number: number >= 0, name, value, "a finite number of at least 0")


def fraction(name: str, value: object) -> float:
    """Returns `value` as a float in [0, 1), or raises a ValueError that names it."""
    return _where(lambda number: 0 <= number < 1, name, value, "a number in [0, 1)")


def _where(holds: Callable[[float], bool], name: str, value: object, requirement: str) -> float:
    number = finite(name, value, requirement)
    if not holds(number):
        raise ValueError(f"Expected argument `{name}` to be {requirement}, but got {value!r}.")
    return number


def count(name: str, value: object) -> int:
    """Returns `value` as a whole number of at least one; 64.0 counts as 64, and so does 64 plus rounding.

    An inverse gives back 63.99999999999999 for the 64 that went in: that is no choice of a fraction.

    Raises:
        ValueError: naming the argument, if the value is anything else.
    """
    requirement = "a whole number of at least 1"
    number = finite(name, value, requirement)
    nearest = round(number)
    if nearest < 1 or abs(number - nearest) > ROUNDING * nearest:
        raise ValueError(f"Expected argument `{name}` to be {requirement}, but got {value!r}.")
    return nearest


def check_reduction(value: object) -> None:
    """Raises a ValueError unless the value is "mean" or "sum"."""
    if not isinstance(value, str) or value not in ("mean", "sum"):
        raise ValueError(f'Expected argument `reduction` to be "mean" or "sum", but got {value!r}.')


def string(name: str, value: object) -> str:
    """Returns `value` if it is a string, or raises a ValueError that names it."""
    if not isinstance(value, str):
        raise ValueError(f"Expected argument `{name}` to be a string, but got {value!r}.")
    return value


def batch_within_dataset(batch_name: str, batch_size: float, dataset_name: str, dataset_size: float) -> None:
    """Raises a ValueError unless the batch fits into the training set."""
    if batch_size > dataset_size:
        raise ValueError(
            f"Expected argument `{batch_name}` to be at most `{dataset_name}` ({dataset_size} examples),"
            f" since a batch is drawn without replacement, but got {batch_size}."
        )


def optional_count(name: str, value: int | None) -> int | None:
    """Returns None or `value` as a whole number of at least 1; raises as `count` does."""
    return None if value is None else count(name, value)


def check_options(batch_size: object, max_examples: object) -> None:
    """Check the options that both APIs share beside the `Method`.

    Raises:
        ValueError: Naming the argument, what was got, and the remedy.
    """
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples)):
        optional_count(name, value)  # type: ignore[arg-type] # that is what is checked


def module(name: str, value: object) -> None:
    """Refuse what is no module, such as a class of modules."""
    if not isinstance(value, nn.Module):
        got = (
            f"the class {value.__name__}; give an instance of it"
            if isinstance(value, type)
            else type(value).__name__
        )
        raise ValueError(f"Expected argument `{name}` to be a torch.nn.Module, got {got}.")


def function(name: str, value: object, signature: str) -> None:
    """Refuse what cannot be called as the signature says, such as "(outputs, targets) -> mean loss"."""
    if not callable(value):
        raise ValueError(f"Expected argument `{name}` to be a function {signature}, got {value!r}.")
