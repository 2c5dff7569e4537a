"""What all data sets of encoded images share: their options, decoding by index, and skipping of unreadable images."""

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from PIL import ImageColor

from dito_jax.data.decode import MODES, Opened, UnreadableImage, decode, is_animated
from dito_jax.data.sources import Augment, DataError, Example, Split
from dito_jax.data.transforms import centre_crop, random_flip


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Options of every data set of encoded images."""

    path: str
    """Where the images are."""
    image_size: int
    """Side of an image in pixels after resizing and center cropping."""
    channels: int = 3
    """Channels of an image: 1 is grey, 3 is RGB."""
    flip: bool = False
    """Mirror training images left to right at random (horizontal flip). Not for letters, digits or medical images."""
    background: str = "white"
    """Color on which transparent images are composited: a CSS name or "#rrggbb"."""
    max_pixels: int = 89_478_485
    """Maximum width x height of an image; larger ones are unreadable. Pillow's own limit is twice the default."""
    max_unreadable: int = 0
    """Number of unreadable images that each process skips before the run ends with an error."""


@runtime_checkable
class Encoded(Protocol):
    """Encoded images and their class numbers, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...  # for messages

    def opened(self, index: int) -> Opened: ...

    def label(self, index: int) -> int: ...


class ImageSource:
    """One split of a data set of encoded images; each image is decoded when it is accessed.

    An unreadable image is replaced by the next readable one, so the batches stay a function of seed and step. `notes`
    are lines for the user about what was left out; `unreadable` has the reason of each image that was skipped.
    """

    owners: Int[np.ndarray, " n"] | None = None  # the owner of each example, for user-level privacy

    def __init__(
        self,
        config: ImageData,
        split: Split,
        stored: Encoded,
        classes: Sequence[str],
        *,
        owners: Int[np.ndarray, " n"] | None = None,
        notes: Sequence[str] = (),
    ):
        self._config, self._stored, self._lock = config, stored, threading.Lock()
        self.image_shape = (config.image_size, config.image_size, config.channels)
        self.augment: Augment | None = random_flip if config.flip and split == "train" else None
        self.classes, self.num_classes = list(classes), len(classes)
        self.owners, self.notes = owners, tuple(notes)
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Example:
        """Reads one example.

        Raises:
          DataError: the image is unreadable, and so were `max_unreadable` others; or the file system failed.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number in itertools.chain(range(index, len(self)), range(index)):
            try:
                return self.read(number)
            except UnreadableImage as error:
                self._skip(error)
        raise DataError(f"{self._config.path}: no readable image; `dito data check` lists the reason of each.")

    def name(self, index: int) -> str:
        """The file of an example, or its file and place in it."""
        return self._stored.name(index)

    def read(self, index: int) -> Example:
        """Reads one example without skipping; raises UnreadableImage if its image cannot be decoded."""
        config, stored = self._config, self._stored
        image = decode(
            stored.name(index), lambda: stored.opened(index), channels=config.channels, image_size=config.image_size,
            background=config.background, max_pixels=config.max_pixels,
        )  # fmt: skip
        pixels = centre_crop(image, config.image_size).reshape(self.image_shape)
        return Example(
            image=pixels.astype(np.float32) / np.float32(127.5) - np.float32(1), label=np.int32(stored.label(index))
        )

    def is_animated(self, index: int) -> bool:
        """Whether a readable image has several frames, of which only the first is used."""
        return is_animated(lambda: self._stored.opened(index))

    def _skip(self, error: UnreadableImage) -> None:
        """Counts an unreadable image; raises DataError if it is one too many."""
        with self._lock:
            known = error.name in self.unreadable
            if not known and len(self.unreadable) >= self._config.max_unreadable:
                raise DataError(
                    f"{error} data.max_unreadable is {self._config.max_unreadable}; `dito data check` lists all such "
                    "images."
                ) from error
            self.unreadable[error.name] = error.reason


def check_options(config: ImageData) -> None:
    """Raises DataError if an option is out of range."""
    if config.channels not in MODES:
        raise DataError(f"channels={config.channels}: wanted 1 (grey) or 3 (RGB).")
    if config.image_size < 1:
        raise DataError(f"image_size={config.image_size}: wanted the side of an image in pixels, at least 1.")
    if config.max_pixels < 1 or config.max_unreadable < 0:
        raise DataError(
            f"max_pixels={config.max_pixels}, max_unreadable={config.max_unreadable}: wanted at least 1 and 0."
        )
    try:
        ImageColor.getrgb(config.background)
    except ValueError as error:
        raise DataError(f"background={config.background!r}: wanted a color such as white or #808080.") from error
