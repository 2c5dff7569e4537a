"""The interface of a data set: examples by index, readable in any order and from any thread."""

from collections.abc import Callable
from typing import Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from dito_jax.errors import UserError


Split = Literal["train", "validation"]

# Accepted folder or file names of each split; the first that exists is used.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "test", "heldout"),
}
VALIDATION_ONE_IN = 20  # size of the validation split if a folder or file has no split: one example in 20


class DataError(UserError):
    """Data cannot be used; one line says which, why, and what to do."""


def printable(name: str) -> str:
    """The name of a file for a message: on one line, with bytes that are not UTF-8 as escapes."""
    return name.encode(errors="backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


class Example(TypedDict):
    """One example: an image in [-1, 1] or a scaled latent, and its class label."""

    image: Float32[np.ndarray, "h w c"]
    label: np.int32


class Batch(TypedDict):
    """A batch of B examples."""

    image: Float32[np.ndarray, "B h w c"]
    label: Int32[np.ndarray, " B"]


Augment = Callable[[Example, np.random.Generator], Example]


@runtime_checkable
class Source(Protocol):
    """One split of a data set."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # h, w, c

    @property
    def num_classes(self) -> int: ...

    @property
    def augment(self) -> Augment | None: ...  # random augmentation of training examples

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def class_names(source: Source) -> list[str]:
    """Class names in the order of the class numbers; the numbers as text if the source has no `classes`."""
    names = getattr(source, "classes", None)
    return [str(number) for number in range(source.num_classes)] if names is None else list(names)


def notes(source: Source) -> tuple[str, ...]:
    """Lines for the user about the examples of `source`, such as what was left out."""
    return tuple(getattr(source, "notes", ()))


def arrays(source: Source) -> Batch:
    """All examples of `source` in order, without augmentation, for data that fits in memory."""
    examples = [source[i] for i in range(len(source))]
    return Batch(
        image=np.stack([example["image"] for example in examples]),
        label=np.stack([example["label"] for example in examples]),
    )


def drawn(source: Source, most: int) -> Batch:
    """At most `most` examples in a fixed random order (sources are sorted by class), without augmentation."""
    order = np.random.default_rng(0).permutation(len(source))[:most]
    examples = [source[int(i)] for i in order]
    return Batch(image=np.stack([e["image"] for e in examples]), label=np.stack([e["label"] for e in examples]))
