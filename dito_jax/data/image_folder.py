"""Images in folders named after their classes.

    path/<class>/*.{png,jpg,...}                           no split: one image in twenty is the validation split
    path/train/<class>/*   path/validation/<class>/*       your own split; the names val and test also work
    path/<class>/<folder>/*                                with nested=True

Classes are numbered in alphabetical order; names that start with a dot are ignored. Listing the folders takes no stat
of each file.
"""

import collections
import dataclasses
import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dito_jax.data.decode import SUFFIXES
from dito_jax.data.images import ImageData, ImageSource, check_options
from dito_jax.data.names import Names
from dito_jax.data.sources import SPLIT_NAMES, VALIDATION_ONE_IN, DataError, Split, printable


@dataclasses.dataclass(frozen=True)
class ImageFolderData(ImageData):
    """Your own images, in one folder per class.

    `path` has one subfolder of images per class, or such folders in train/ and validation/.
    """

    nested: bool = False
    """Also read the images in sub-folders of a class folder."""
    owner_pattern: str | None = None
    """Regular expression, searched in <class>/<file> (or <class>/<folder>/<file>); its group is the owner of the image,
    for privacy.images_per_user. "/(.+)/" is the folder in a class folder."""

    def open(self, split: Split) -> "ImageFolder":
        """The images of one split.

        Raises:
          DataError: the folder cannot be read, or it has no class folders, or no images for this split.
        """
        return ImageFolder(self, split)


class ImageFolder(ImageSource):
    """One split of an image folder."""

    def __init__(self, config: ImageFolderData, split: Split):
        check_options(config)
        found = _scan(config, Path(config.path).expanduser(), split)
        self._files = found.files
        super().__init__(config, split, found.files, found.classes, owners=found.owners, notes=found.notes())


class Files:
    """The image files of a split with their class numbers; iterates over (path, class number)."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._names, self._ends, self._labels = Names(), array("Q"), array("i")

    def add(self, folder: str, label: int, names: list[str]) -> None:
        """Adds the files of a class."""
        for name in names:
            self._names.append(name)
        self._folders.append(folder)
        self._labels.append(label)
        self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.name(index), self.label(index)

    def name(self, index: int) -> str:
        return os.path.join(self._folders[self._place(index)], self._names[index])

    def opened(self, index: int) -> str:
        return self.name(index)

    def label(self, index: int) -> int:
        return self._labels[self._place(index)]

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(np.frombuffer(self._ends, np.uint64), index, side="right"))


@dataclasses.dataclass
class Found:
    """What was found in an image folder, and what was left out."""

    root: Path
    classes: list[str]
    files: Files = dataclasses.field(default_factory=Files)
    owners: np.ndarray | None = None
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    empty: list[str] = dataclasses.field(default_factory=list)

    def notes(self) -> list[str]:
        """A line about what was left out, and one about empty classes."""
        lines = []
        if self.left_out:
            kinds = ", ".join(f"{number:,} x {kind}" for kind, number in sorted(self.left_out.items()))
            lines.append(f"{self.root}: {len(self.files):,} images in {len(self.classes):,} classes; left out {kinds}.")
        if self.empty:
            names = ", ".join(map(printable, self.empty[:10])) + (" ..." if len(self.empty) > 10 else "")
            lines.append(f"{self.root}: no training images in class {names}: remove such folders, or add images.")
        return lines


def _scan(config: ImageFolderData, root: Path, split: Split) -> Found:
    """The classes and the files of a split."""
    folders = {part: [n for n in names if (root / n).is_dir()] for part, names in SPLIT_NAMES.items()}
    own_split = any(folders.values())
    if own_split and not folders[split]:
        raise DataError(
            f"{root / split}: no such folder, but {root} has one for the other split; name the folders "
            "train and validation (or val, or test), or put all classes into one folder without splits."
        )
    train = root / next(iter(folders["train"]), "train") if own_split else root
    folder = root / folders[split][0] if own_split else root
    (classes, _), (present, beside) = _listed(train), _listed(folder)
    if not classes:
        raise DataError(f"{train}: no class folders; put the images of each class into a folder named after the class.")
    if unknown := sorted(set(present) - set(classes)):
        raise DataError(f"{folder / unknown[0]}: {train} has no such class; rename this folder or remove it.")
    found = Found(folder, classes)
    found.left_out.update({"file beside the class folders": beside} if beside else {})
    owner_of = _Owners(config.owner_pattern, folder) if config.owner_pattern else None
    for label, name in enumerate(classes):
        every = _images(folder / name, found.left_out, nested=config.nested) if name in present else []
        chosen = [file for file in every if own_split or _drawn(name, file) == split]
        found.files.add(str(folder / name), label, chosen)
        if split == "train" and not chosen:
            found.empty.append(name)
        if owner_of is not None:
            owner_of.add(name, chosen)
    if not len(found.files):
        raise DataError(
            f"{folder}: no {'/'.join(SUFFIXES)} files for the {split} split in its class folders; "
            f"add images, or make your own split in {root / 'train'} and {root / 'validation'}."
        )
    found.owners = None if owner_of is None else owner_of.numbers()
    return found


class _Owners:
    """Numbers the owners of files in the order of their first file."""

    def __init__(self, pattern: str, folder: Path):
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise DataError(f"owner_pattern={pattern!r}: not a regular expression ({error}).") from error
        if self._pattern.groups != 1:
            raise DataError(f"owner_pattern={pattern!r}: wanted one group in parentheses, which is the owner.")
        self._folder, self._known, self._of_files = folder, dict[str, int](), array("q")

    def add(self, name: str, files: list[str]) -> None:
        """Adds the files of the class `name`."""
        for file in files:
            match = self._pattern.search(f"{name}/{file}")
            if match is None or match[1] is None:
                raise DataError(
                    f"{printable(str(self._folder / name / file))}: owner_pattern {self._pattern.pattern!r} does not "
                    f"match {printable(name)}/{printable(file)}, so this image has no owner; change one of them."
                )
            self._of_files.append(self._known.setdefault(match[1], len(self._known)))

    def numbers(self) -> np.ndarray:
        """The number of the owner of each file."""
        return np.frombuffer(self._of_files, np.int64)


def _listed(folder: Path) -> tuple[list[str], int]:
    """Sorted names of the folders in a folder, and the number of other files in it."""
    try:
        with os.scandir(folder) as entries:
            names = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; give a readable folder of images.") from error
    return sorted(name for name, is_folder in names if is_folder), sum(not is_folder for _, is_folder in names)


def _images(folder: Path, left_out: collections.Counter[str], *, nested: bool) -> list[str]:
    """Sorted names of the image files of a class, relative to its folder; counts what is left out."""
    names = []
    for name in _walk(str(folder), left_out, nested=nested):
        if name.lower().endswith(SUFFIXES):
            names.append(name)
        else:
            left_out[printable(os.path.splitext(name)[1].lower()) or "file without a suffix"] += 1
    return sorted(names)


def _walk(
    folder: str, left_out: collections.Counter[str], *, nested: bool, prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Names of the files in a folder; `above` are the real paths of the folders above it, as links may form loops."""
    above = (*above, os.path.realpath(folder))
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    yield prefix + entry.name
                elif not nested:
                    left_out["sub-folder (--data.nested True reads it)"] += 1
                elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                    yield from _walk(entry.path, left_out, nested=True, prefix=f"{prefix}{entry.name}/", above=above)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; give a readable folder of images.") from error


def _drawn(name: str, file: str) -> Split:
    """The split of an image by a hash of its name, so that it does not change when other images are added."""
    digest = hashlib.sha256(os.fsencode(f"{name}/{file}")).digest()
    return "validation" if int.from_bytes(digest[:8]) % VALIDATION_ONE_IN == 0 else "train"
