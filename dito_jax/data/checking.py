"""Reads every example of a source once, to find those that a run could not read."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

from dito_jax.data.images import ImageSource
from dito_jax.data.sources import DataError, Source


AHEAD = 64  # examples per thread that are read before the first of them is looked at


@dataclasses.dataclass
class Checked:
    """What a check found in one split."""

    examples: int = 0
    bad: int = 0
    animated: int = 0


def check_examples(source: Source, on_bad: Callable[[str], None], *, threads: int = 4) -> Checked:
    """Reads all examples; calls `on_bad` with one line for each that cannot be read, in the order of the source."""
    checked = Checked()
    for error, animated in _outcomes(source, threads):
        checked.examples += 1
        checked.animated += animated
        if error is not None:
            checked.bad += 1
            on_bad(str(error))
    return checked


def _outcomes(source: Source, threads: int) -> Iterator[tuple[DataError | None, bool]]:
    """The error of each example, or None, and whether it is animated."""

    def outcome(index: int) -> tuple[DataError | None, bool]:
        try:
            if isinstance(source, ImageSource):
                source.read(index)
                return None, source.is_animated(index)
            source[index]
        except DataError as error:
            return error, False
        return None, False

    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="data-check") as readers:
        for start in range(0, len(source), AHEAD * threads):
            yield from readers.map(outcome, range(start, min(start + AHEAD * threads, len(source))))
