"""Batches of private training: Poisson subsampling of units, with fixed shapes by padding.

Guarantees
  - In each step each unit is in the batch with probability q, independently of other units and other steps, as the
    accountant assumes (Poisson subsampling). Shuffled epochs would have a guarantee that is several times weaker
    (https://arxiv.org/abs/2411.10614). If more units are drawn than fit (max_batch), a random subset is kept; the
    accountant includes this truncation.
  - The draw is jax-privacy's, with a generator per step: every process computes the same draw, without earlier steps. A
    batch may be empty.
  - The content and the size of a batch are secret: shapes and the amount of computation do not depend on them. But only
    the drawn examples are read, so the data loading time does depend on the batch. It overlaps with the previous step
    and is visible if it is longer than the step: do not publish step times.
"""

import concurrent.futures
import dataclasses
import functools
from typing import Any

import numpy as np
from jax_privacy.batch_selection import CyclicPoissonSampling
from jaxtyping import Int

from dito_jax.data import Source
from dito_jax.privacy.keys import StepKeys
from dito_jax.privacy.settings import StepPlan


THREADS = 4


@dataclasses.dataclass(frozen=True)
class Units:
    """The privacy units: unit i owns the examples with the indices of_unit[i]."""

    of_unit: tuple[Int[np.ndarray, "..."], ...] | range

    @classmethod
    def examples(cls, source: Source) -> "Units":
        """Each example is a unit."""
        return cls(range(len(source)))

    @classmethod
    def users(cls, owners: Int[np.ndarray, " n"]) -> "Units":
        """Each user is a unit, with all of the user's examples."""
        order = np.argsort(owners, kind="stable")
        _, first = np.unique(owners[order], return_index=True)
        return cls(tuple(np.split(order, first[1:])))

    def __len__(self) -> int:
        return len(self.of_unit)


class PoissonBatches:
    """`batch(step)` returns the rows of a step's batch for one of `shares` processes."""

    def __init__(
        self,
        source: Source,
        units: Units,
        plan: StepPlan,
        keys: StepKeys,
        *,
        rows: int | None = None,
        images_per_unit: int = 1,
        share: int = 0,
        shares: int = 1,
    ):
        """`rows` is the number of rows of all shares together, at least plan.max_batch; None: plan.max_batch."""
        self._source, self._units, self._plan, self._keys = source, units, plan, keys
        self._images = images_per_unit
        self._all_rows = rows or plan.max_batch
        size = self._all_rows // shares
        self._rows = range(share * size, (share + 1) * size)
        self._readers = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="private-batches")

    def chosen(self, step: int) -> Int[np.ndarray, "B m"]:
        """Indices of the examples in a step's batch; -1 is padding. These are secret."""
        rng = self._keys.generator(step, "batch")
        plan = self._plan
        sampling = CyclicPoissonSampling(plan.sampling_prob, 1, truncated_batch_size=plan.max_batch)
        (drawn,) = sampling.batch_iterator(len(self._units), rng=rng)
        chosen = np.full((self._all_rows, self._images), -1, np.int64)
        for row, unit in enumerate(drawn):
            examples = np.atleast_1d(self._units.of_unit[int(unit)])
            some = rng.permutation(examples)[: self._images] if examples.size > 1 else examples
            chosen[row, : some.size] = some
        return chosen

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The arrays {"image" (B, m, h, w, c), "label" (B, m), "padding" (B, m), "draw_key" (8,), "noise_key" (8,)}."""
        numbers = self.chosen(step)[self._rows.start : self._rows.stop]
        images = np.zeros((*numbers.shape, *self._source.image_shape), np.float32)
        labels = np.zeros(numbers.shape, np.int32)
        places = list(zip(*np.nonzero(numbers >= 0), strict=True))
        read = functools.partial(self._read, step, numbers)
        for place, example in zip(places, self._readers.map(read, places), strict=True):
            images[place], labels[place] = example["image"], example["label"]
        return {
            "image": images,
            "label": labels,
            "padding": numbers < 0,
            "draw_key": self._keys.key(step, "draw"),
            "noise_key": self._keys.key(step, "noise"),
        }

    def _read(self, step: int, numbers, place) -> Any:
        example = self._source[int(numbers[place])]
        if self._source.augment is None:
            return example
        row = self._rows.start + int(place[0])
        seed = [*self._keys.key(step, "draw").tolist(), row, int(place[1])]
        return self._source.augment(example, np.random.default_rng(seed))
