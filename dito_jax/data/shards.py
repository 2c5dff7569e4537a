"""Finds the files of a split of a sharded data set: a file, a folder, a glob, or a path with {split}."""

import glob
import os
import re

import numpy as np
from jaxtyping import Int

from dito_jax.data.sources import SPLIT_NAMES, VALIDATION_ONE_IN, DataError, Split


def shards(path: str, split: Split, suffixes: tuple[str, ...]) -> tuple[list[str], bool]:
    """The files of a split, sorted, and whether the data set has own files for each split.

    "{split}" in `path` stands for train, and for validation, val or test. Of several files, those whose names begin
    with these words ("train-00000.tar") belong to that split only. A single file, and files without a split, hold both
    (`of_split`).

    Raises:
      DataError: there are no such files.
    """
    path = os.path.expanduser(path)
    wanted = "/".join(suffixes)
    if "{split}" in path:
        for name in SPLIT_NAMES[split]:
            if files := _found(path.replace("{split}", name), suffixes):
                return files, True
        raise DataError(f"{path}: no {wanted} files for the {split} split; give a file, a folder or a glob.")
    files = _found(path, suffixes)
    if not files:
        raise DataError(f"{path}: no {wanted} files; give a file, a folder or a glob of them.")
    if len(files) == 1 or not any(_begins(file, SPLIT_NAMES["train"]) for file in files):
        return files, False
    for name in SPLIT_NAMES[split]:
        if chosen := [file for file in files if _begins(file, (name,))]:
            return chosen, True
    raise DataError(
        f"{path}: no {wanted} files for the {split} split, but some whose names begin with train; name the others "
        "validation-..., val-... or test-...."
    )


def of_split(count: int, split: Split, *, own_files: bool) -> Int[np.ndarray, " n"]:
    """Numbers of the examples of a split among `count`: all, or without own files one in twenty for validation."""
    numbers = np.arange(count)
    if own_files:
        return numbers
    validation = numbers % VALIDATION_ONE_IN == VALIDATION_ONE_IN - 1
    return numbers[validation if split == "validation" else ~validation]


def _found(path: str, suffixes: tuple[str, ...]) -> list[str]:
    if os.path.isdir(path):
        every = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
        return [file for file in every if file.endswith(suffixes)]
    return [path] if os.path.exists(path) else sorted(glob.glob(path))


def _begins(file: str, names: tuple[str, ...]) -> bool:
    return re.match(rf"({'|'.join(names)})([-_.]|$)", os.path.basename(file)) is not None
