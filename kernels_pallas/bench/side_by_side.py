"""`bench --jobs N`: N processes compile in parallel; they are timed one at a time, each with the GPU to itself.

Compilation takes most of a benchmark's time and runs on the CPU. Timing needs the GPU exclusively. The work is done in
rounds: each process prepares (compiles and checks) one pass of one case and waits at a barrier for the others; then
the processes time their calls one after the other. A task that ran out of memory beside the others is repeated at the
end, alone.

A process whose GPU context has failed (after an illegal address, for example) fails on every later call, so it takes
no more tasks.
"""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


type Task = tuple[str, str, str]  # op, case, pass
type Rows = list[dict[str, str]]

# Several processes share the GPU's memory, so each has to free at once what it no longer needs.
SHARED_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")
BARRIER_TIMEOUT = 900  # seconds that the processes of a round wait for the last one


def share_memory() -> None:
    """Sets the environment of the worker processes. Call it in their parent, before JAX starts."""
    os.environ.update(SHARED_MEMORY)


def measure_all(prepare: Callable, finish: Callable, tasks: Sequence[Task], jobs: int) -> Iterator[Rows]:
    """Yields the rows of each task as they are measured; tasks that ran out of memory come last, measured alone.

    Args:
      prepare: prepare(op, case, pass) compiles and checks a task. It must be a module-level function, so that worker
        processes can import it.
      finish: finish(result of `prepare`) times the task and returns its rows.

    Raises:
      RuntimeError: a process died. The rows that were yielded before are valid.
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
    """Synchronisation objects that the processes of one run share."""

    barrier: Any
    turn: Any  # a lock: the process that holds it has the GPU to itself
    taken: Any  # number of tasks taken so far
    healthy: Any  # number of processes whose GPU still works
    results: Any  # a queue of (task, rows), and of None from each process that ends


def _rounds(prepare: Callable, finish: Callable, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Rows]]:
    context = multiprocessing.get_context("spawn")
    counts = context.Value("i", 0), context.Value("i", jobs)
    shared = _Shared(context.Barrier(jobs), context.Lock(), *counts, context.Queue())
    processes = [context.Process(target=_work, args=(prepare, finish, tasks, shared)) for _ in range(jobs)]
    try:
        _start(processes)
        ended = 0
        while ended < jobs:
            if (found := _next(shared.results, processes)) is not None:
                yield found
            ended += found is None
        if missing := len(tasks) - shared.taken.value:
            raise RuntimeError(f"{missing} of {len(tasks)} were not measured: the GPU failed in every process")
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
    finally:
        shared.barrier.abort()
        for process in processes:
            process.join(5)
            process.kill()


def _start(processes: Sequence[Any]) -> None:
    """Starts worker processes that Ctrl-C does not reach: they inherit the signal mask. Their parent kills them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _next(results: Any, processes: Sequence[Any]) -> tuple[Task, Rows] | None:
    """The next task and its rows, or None if a process has ended."""
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if codes := [process.exitcode for process in processes if process.exitcode]:
                raise RuntimeError(f"a process of --jobs died, exit code {codes[0]}") from None


def _work(prepare: Callable, finish: Callable, tasks: Sequence[Task], shared: _Shared) -> None:
    """The worker process: one task per round, until no task is left or no process has a working GPU."""
    healthy = True
    while True:
        task = _take(tasks, shared.taken) if healthy else None
        ready = prepare(*task) if task else None
        # `healthy` changes only after the first wait, `taken` only before it: all processes compute the same `done`.
        all_failed = shared.healthy.value == 0
        shared.barrier.wait(BARRIER_TIMEOUT)
        done = all_failed or shared.taken.value >= len(tasks)
        with shared.turn:
            if task:
                shared.results.put((task, finish(ready)))
                ready = None
                if not _gpu_answers():
                    healthy = False
                    shared.healthy.value -= 1
        shared.barrier.wait(BARRIER_TIMEOUT)
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
