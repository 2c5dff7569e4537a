"""What every data set is: examples by number, readable in any order and from any thread."""

from collections.abc import Callable
from typing import Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from dito_jax.errors import UserError


Split = Literal["train", "validation"]

# Names that a folder or a file of each split may have; the first that exists is taken.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "test", "heldout"),
}
VALIDATION_ONE_IN = 20  # where a folder or a file comes without a split of its own


class DataError(UserError):
    """Data that cannot be used, in one line: which, why, and what to do."""


class Example(TypedDict):
    """An image in [-1, 1], or a scaled latent, and its class."""

    image: Float32[np.ndarray, "h w c"]
    label: np.int32


class Batch(TypedDict):
    """B examples, stacked."""

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
    def augment(self) -> Augment | None: ...  # what training does to an example each time it is drawn

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def class_names(source: Source) -> list[str]:
    """The names of the classes in the order of their numbers; where a source has no `classes`, the numbers."""
    names = getattr(source, "classes", None)
    return [str(number) for number in range(source.num_classes)] if names is None else list(names)


def arrays(source: Source) -> Batch:
    """Every example of `source`, not augmented, in the order of its numbers: for data that fit in memory."""
    examples = [source[i] for i in range(len(source))]
    return Batch(
        image=np.stack([example["image"] for example in examples]),
        label=np.stack([example["label"] for example in examples]),
    )


def drawn(source: Source, most: int) -> Batch:
    """At most so many examples, in an order of chance, always the same: sources come sorted by class."""
    order = np.random.default_rng(0).permutation(len(source))[:most]
    examples = [source[int(i)] for i in order]
    return Batch(image=np.stack([e["image"] for e in examples]), label=np.stack([e["label"] for e in examples]))
