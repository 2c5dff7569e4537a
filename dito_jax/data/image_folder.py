"""Images in folders named after their classes.

    path/<class>/*.{png,jpg,jpeg,webp}                     no split: one image in twenty is the validation split
    path/train/<class>/*   path/validation/<class>/*       your own split; the names val and test also work

Classes are numbered in alphabetical order; names that start with a dot are ignored.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dito_jax.data.sources import SPLIT_NAMES, VALIDATION_ONE_IN, Augment, DataError, Example, Split
from dito_jax.data.transforms import centre_crop, random_flip


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class ImageFolderData:
    """Your own images, in one folder per class."""

    path: str
    """Folder with one subfolder of images per class, or with such folders in train/ and validation/."""
    image_size: int
    """Side of an image in pixels after resizing and center cropping."""
    channels: int = 3
    """Channels of an image: 1 is grey, 3 is RGB."""
    flip: bool = True
    """Mirror training images left to right at random; validation images are never mirrored."""

    def open(self, split: Split) -> "ImageFolder":
        """The images of one split.

        Raises:
          DataError: the folder cannot be read, or it has no class folders, or no images for this split.
        """
        return ImageFolder(self, split)


class ImageFolder:
    """One split of an image folder; each image is read when it is accessed."""

    def __init__(self, config: ImageFolderData, split: Split):
        if config.channels not in MODES:
            raise DataError(f"channels={config.channels}: wanted 1 (grey) or 3 (RGB).")
        if config.image_size < 1:
            raise DataError(f"image_size={config.image_size}: wanted the side of an image in pixels, at least 1.")
        self.image_shape = (config.image_size, config.image_size, config.channels)
        self.augment: Augment | None = random_flip if config.flip and split == "train" else None
        self.classes, self._files = _scan(Path(config.path).expanduser(), split)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._files)

    def contents(self) -> Iterator[bytes]:
        """Class number and name of each file, for the fingerprint of the data set."""
        for path, label in self._files:
            yield os.fsencode(f"{label}/{os.path.basename(path)}")

    def __getitem__(self, index: int) -> Example:
        """Reads one example; raises DataError if the file is not an image or cannot be read."""
        path, label = self._files[index]
        size, _, channels = self.image_shape
        pixels = centre_crop(_decode(path, MODES[channels]), size)
        image = pixels.reshape(self.image_shape).astype(np.float32) / np.float32(127.5) - np.float32(1)
        return Example(image=image, label=np.int32(label))


def _decode(path: str, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    # Pillow raises these for damaged files, and OSError is also raised by the operating system.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({_reason(error)}); repair it or remove it.") from error


def _scan(root: Path, split: Split) -> tuple[list[str], list[tuple[str, int]]]:
    """The class names, and (path, class number) of each file of the split."""
    folders = {part: [n for n in names if (root / n).is_dir()] for part, names in SPLIT_NAMES.items()}
    own_split = any(folders.values())
    if own_split and not folders[split]:
        raise DataError(
            f"{root / split}: no such folder, but {root} has one for the other split; name the folders "
            "train and validation (or val, or test), or put all classes into one folder without splits."
        )
    train = root / next(iter(folders["train"]), "train") if own_split else root
    folder = root / folders[split][0] if own_split else root
    classes, present = _listed(train, folders=True), _listed(folder, folders=True)
    if not classes:
        raise DataError(f"{train}: no class folders; put the images of each class into a folder named after the class.")
    if unknown := sorted(set(present) - set(classes)):
        raise DataError(f"{folder / unknown[0]}: {train} has no such class; rename this folder or remove it.")
    files = [
        (str(folder / name / file), label)
        for label, name in enumerate(classes)
        if name in present
        for file in _listed(folder / name, folders=False)
        if file.lower().endswith(SUFFIXES) and (own_split or _drawn(name, file) == split)
    ]
    if not files:
        raise DataError(
            f"{folder}: no {'/'.join(SUFFIXES)} files for the {split} split in its class folders; "
            f"add images, or make your own split in {root / 'train'} and {root / 'validation'}."
        )
    return classes, files


def _listed(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the folders, or of the files, in a folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() == folders and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: {_reason(error)}; give a readable folder of images.") from error


def _drawn(name: str, file: str) -> Split:
    """The split of an image by a hash of its name, so that it does not change when other images are added."""
    digest = hashlib.sha256(os.fsencode(f"{name}/{file}")).digest()
    return "validation" if int.from_bytes(digest[:8]) % VALIDATION_ONE_IN == 0 else "train"


def _reason(error: Exception) -> str:
    """The reason of an error without the path."""
    return getattr(error, "strerror", None) or type(error).__name__
