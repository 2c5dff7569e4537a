"""The input pipeline: shuffled, augmented batches from a source; deterministic and resumable.

The examples are drawn in an order that is a pure function of the seed. Draw k lies in epoch k // n, which shuffles the
n examples with its own key, and random augmentation depends on (seed, k) only. Example j of batch i is draw
first_example + i * batch_size + j. The number of processes and threads, and stopping and resuming a run, do not change
the batches; another batch size takes the same draws in other portions.
"""

from typing import TYPE_CHECKING

import numpy as np

from dito_jax.data.sources import Source
from dito_jax.errors import UserError


if TYPE_CHECKING:
    import grain


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    first_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> "grain.DatasetIterator":
    """An endless iterator of training `Batch`es, from draw `first_example` on.

    `batch_size` is the global batch size. Each process gets batch_size / process_count contiguous rows, and the rows of
    all processes in order are the batch of a single process. `source.augment` is applied to each draw. Each of
    `threads` prefetches one batch; 0 reads in the calling thread. The state of the iterator is the number of the next
    batch only, so it does not depend on the number of processes.

    Raises:
      UserError: the batch size is not a multiple of the number of processes. The iterator raises the source's errors.
    """
    import grain  # slow to import, and only needed here

    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} cannot be split over {process_count} processes; "
            f"wanted a multiple of {process_count}."
        )
    # Hashed, because grain shuffles epoch e with key + e: epoch e of seed 1 would otherwise be epoch e + 1 of seed 0.
    shuffle_key, augment_key = (int(key) for key in np.random.SeedSequence(seed).generate_state(2))
    draws = grain.MapDataset.source(source).shuffle(seed=shuffle_key).repeat()
    if source.augment is not None:
        draws = draws.random_map(source.augment, seed=augment_key)
    start, beside = divmod(first_example, batch_size)
    shares = draws[beside:].batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
    iterator = iter(shares.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    grain.experimental.set_next_index(iterator, start)
    return iterator
