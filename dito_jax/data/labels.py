"""Class numbers and owner numbers from the labels of a data set: integers, or names."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dito_jax.data.sources import DataError


def classes_of(values: Sequence[str]) -> list[str]:
    """The class names of a data set with these labels, as text.

    Labels that are all integers from 0 are class numbers, and the classes are all numbers up to the largest. Other
    labels are names, numbered in alphabetical order.

    Raises:
      DataError: a label is a negative integer.
    """
    different = sorted(set(values))
    if not all(value.lstrip("-").isdecimal() for value in different):
        return different
    numbers = [int(value) for value in different]
    if min(numbers, default=0) < 0:
        raise DataError(f"label {min(numbers)}: wanted class numbers from 0, or class names.")
    return [str(number) for number in range(max(numbers, default=-1) + 1)]


def numbered(values: Sequence[str], classes: Sequence[str], where: str) -> Int[np.ndarray, " n"]:
    """The class number of each label.

    Raises:
      DataError: a label is not among the classes, which are those of the training data.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    text = lambda value: str(int(value)) if value.isdecimal() else value  # "007" is class 7
    if unknown := sorted({value for value in values if text(value) not in numbers and value not in numbers}):
        raise DataError(f"{where}: the training data have no class {unknown[0]!r}; correct this label.")
    return np.array([numbers.get(value, numbers.get(text(value), -1)) for value in values], np.int32)


def owner_numbers(values: Sequence[str] | np.ndarray) -> Int[np.ndarray, " n"]:
    """Numbers owners, given by name or number, in sorted order."""
    return np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1).astype(np.int64)
