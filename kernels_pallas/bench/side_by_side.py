"""`bench --jobs N`: N processes compile side by side; the clock runs for one at a time, with the GPU to itself.

Compiling is most of a benchmark's time and takes the CPU. Timing takes the GPU, and takes it alone. So the work goes
in rounds: each process makes one pass of one case ready, compiled and checked, and waits for the others; then they
time theirs in turn. What ran out of memory beside the others is measured again at the end, alone.

A process whose GPU has failed (an illegal address, say) keeps failing whatever it is asked, so it takes no more work.
"""

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


type Task = tuple[str, str, str]  # op, case, pass
type Rows = list[dict[str, str]]

# Several processes share the GPU's memory, so that each gives back at once what it no longer needs.
SHARED_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")
PATIENCE = 900  # seconds that the processes of a round wait for the last


def share_memory() -> None:
    """To be called before JAX starts, in the process that starts the others."""
    os.environ.update(SHARED_MEMORY)


def measure_all(prepare: Callable, finish: Callable, tasks: Sequence[Task], jobs: int) -> Iterator[Rows]:
    """The rows of each task, as they come; last those that are measured alone.

    Args:
      prepare: of (op, case, pass): makes it ready to be timed. A function of a module: processes import it.
      finish: of what `prepare` returned: times it. Returns its rows.

    Raises:
      RuntimeError: a process died. What came before it stays measured.
    """
    again = []
    for task, rows in _rounds(prepare, finish, tasks, min(jobs, len(tasks))):
        if any(word in row["status"] for row in rows for word in OUT_OF_MEMORY):
            again.append(task)
        else:
            yield rows
    for task in again:
        for _, rows in _rounds(prepare, finish, [task], 1):
            yield rows


class _Shared(NamedTuple):
    """What the processes of one run have in common."""

    barrier: Any
    turn: Any  # whoever holds it has the GPU to itself
    taken: Any  # tasks, so far
    healthy: Any  # processes whose GPU still answers
    results: Any  # (task, rows), and None from each process that ends


def _rounds(prepare: Callable, finish: Callable, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Rows]]:
    context = multiprocessing.get_context("spawn")
    counts = context.Value("i", 0), context.Value("i", jobs)
    shared = _Shared(context.Barrier(jobs), context.Lock(), *counts, context.Queue())
    processes = [context.Process(target=_work, args=(prepare, finish, tasks, shared)) for _ in range(jobs)]
    for process in processes:
        process.start()
    try:
        ended = 0
        while ended < jobs:
            if (found := _next(shared.results, processes)) is not None:
                yield found
            ended += found is None
        if missing := len(tasks) - shared.taken.value:
            raise RuntimeError(f"{missing} of {len(tasks)} were not measured: the GPU failed in every process")
    finally:
        shared.barrier.abort()
        for process in processes:
            process.join(5)
            process.kill()


def _next(results: Any, processes: Sequence[Any]) -> tuple[Task, Rows] | None:
    """The next task and its rows; None when one more process has ended."""
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if codes := [process.exitcode for process in processes if process.exitcode]:
                raise RuntimeError(f"a process of --jobs died, exit code {codes[0]}") from None


def _work(prepare: Callable, finish: Callable, tasks: Sequence[Task], shared: _Shared) -> None:
    """One process: a task a round, until none is left, or no process's GPU answers."""
    healthy = True
    while True:
        task = _take(tasks, shared.taken) if healthy else None
        ready = prepare(*task) if task else None
        nobody = shared.healthy.value == 0  # it changes after the first wait only, `taken` before it only:
        shared.barrier.wait(PATIENCE)
        done = nobody or shared.taken.value >= len(tasks)  # all processes come to the same
        with shared.turn:
            if task:
                shared.results.put((task, finish(ready)))
                ready = None
                if not _gpu_answers():
                    healthy = False
                    shared.healthy.value -= 1
        shared.barrier.wait(PATIENCE)
        if done:
            shared.results.put(None)
            return


def _take(tasks: Sequence[Task], taken: Any) -> Task | None:
    with taken.get_lock():
        if taken.value >= len(tasks):
            return None
        taken.value += 1
        return tasks[taken.value - 1]


def _gpu_answers() -> bool:
    try:
        return float(jnp.add(jnp.ones(()), 1.0)) == 2.0
    except jax.errors.JaxRuntimeError:
        return False
