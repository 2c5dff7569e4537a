"""From a source to batches.

The stream is a pure function of (seed, step). Example j of step i is draw number k = i * batch_size + j:
epoch k // n shuffles the n examples by a key of its own, and what chance does to a draw depends on (seed,
k) alone. How many processes share a batch, how many threads read, and where a run stopped and resumed
change nothing.
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
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> "grain.DatasetIterator":
    """An endless iterator of `Batch`es, from step `start` on; for training.

    `batch_size` is the global one: each process gets batch_size / process_count neighbouring rows, and the
    processes' shares in order are the batch of a single process. `source.augment` is done to each draw.
    Each of `threads` reads one batch ahead of its need; 0 reads in the calling thread.

    `get_state`, `set_state` and Orbax's checkpoints hold the step, so any number of processes can set the
    state.

    Raises:
      UserError: the batch does not divide among the processes. The iterator raises what the source does.
    """
    import grain  # slow to import, and only needed here

    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; "
            f"give a multiple of {process_count}."
        )
    # Hashed, for grain shuffles epoch e by key + e: the epochs of seed 1 would be those of seed 0, one late.
    shuffle_key, augment_key = (int(key) for key in np.random.SeedSequence(seed).generate_state(2))
    draws = grain.MapDataset.source(source).shuffle(seed=shuffle_key).repeat()
    if source.augment is not None:
        draws = draws.random_map(source.augment, seed=augment_key)
    shares = draws.batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
    iterator = iter(shares.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    grain.experimental.set_next_index(iterator, start)
    return iterator
