"""Multi-process (multi-host) runs: jax.distributed initialization, barriers, and a shared key-value store.

The key-value store is kept by process 0. Each process can publish texts in it and read all of them, also while devices
are blocked in a collective. A single process uses a local dict instead. The store has no authentication: any program
that reaches its port can read and write it, so nothing secret belongs there. It listens on all interfaces, or on the
loopback interface only if JAX_COORDINATOR_ADDRESS is a loopback address.

Barriers use the store, not a collective. CPU devices of several processes communicate by Gloo, which gives all
processes 30 s to reach the first collective of a group of devices. `connect` has those first collectives at the start,
behind a barrier; later ones wait as long as it takes.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # private module of JAX: its key-value store; imported in this file only
from jax.experimental import multihost_utils

from dito_jax.errors import UserError


GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
DETECTED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # Slurm and Open MPI; JAX reads their other variables itself
HEARTBEAT_SECONDS = 30  # without a heartbeat for so long, JAX treats a process as dead and ends the others
BARRIER_SECONDS = 7200.0  # longer than a phase may take by default (watchdog.phase_timeout_seconds)
REPORT_EVERY = 60.0  # seconds between the lines of a process that waits at a barrier
LEFT = "left"  # prefix in the key-value store: exit codes of the processes that have ended

_own: dict[str, str] = {}
_gathers = itertools.count()  # all processes call `gather` in the same order


def join() -> None:
    """Calls jax.distributed.initialize if the environment describes several processes; call it before using devices.

    The environment is JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or the variables of
    Slurm or Open MPI. Returns when all processes have joined.

    Raises:
      UserError: some of the three variables are missing or invalid, or JAX's preemption service is switched off.
    """
    if any(name in os.environ for name in GIVEN):
        address, count, index = _given(os.environ)
        if count > 1:
            _check_service()
            here = address.rpartition(":")[0] in LOOPBACK  # then other hosts cannot reach the key-value store
            jax.distributed.initialize(
                address, count, index,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS, coordinator_bind_address=address if here else None,
            )  # fmt: skip
    elif any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1 for name in DETECTED):
        _check_service()
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def count() -> int:
    """Number of processes of the run; unlike `jax.process_count` it does not initialize the devices."""
    return distributed.global_state.num_processes


def index() -> int:
    """Index of this process; unlike `jax.process_index` it does not initialize the devices."""
    return distributed.global_state.process_id


def agree(value: bool, what: str = "a barrier", *, seconds: float = BARRIER_SECONDS) -> bool:
    """Logical and of `value` over all processes; all of them must call it, and each waits for the last.

    Raises: the errors of `gather`.
    """
    return all(text == "1" for text in gather("1" if value else "0", what, seconds=seconds))


def gather(value: str, what: str = "a barrier", *, seconds: float = BARRIER_SECONDS) -> list[str]:
    """The texts of all processes in order; all of them must call it, and each waits for the last.

    Uses the key-value store only. A process that waits long says on stderr what it waits for.

    Raises:
      TimeoutError: a process did not come within `seconds`.
      RuntimeError: a process has ended, or raised by JAX if the processes are no longer connected.
    """
    if count() == 1:
        return [value]
    number = next(_gathers)
    # Two places suffice: a process at number n + 2 has read all texts of n + 1, and their writers had read all of n.
    place, mark = f"gather/{number % 2}", f"{number} "
    began = reported = time.monotonic()
    pause = 0.001
    _persistently(lambda: publish(f"{place}/{index()}", mark + value), began + seconds)
    while True:
        found = _persistently(lambda: published(place), began + seconds)
        here = {int(key): text.removeprefix(mark) for key, text in found.items() if text.startswith(mark)}
        missing = sorted(set(range(count())) - here.keys())
        if not missing:
            return [here[process] for process in range(count())]
        now = time.monotonic()
        if pause > 0.05:
            _check_present(missing, what)
        names = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}"
        if now > began + seconds:
            raise TimeoutError(f"{names} did not come to {what} within {seconds:g} s")
        if now > reported + REPORT_EVERY:
            reported = now
            print(f"process {index()}: at {what}, waiting for {names} since {now - began:.0f} s", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def same(value: bytes) -> bool:
    """Whether `value`, which has the same length in all processes, is the same in all of them; a collective."""
    values = collected(np.frombuffer(value, np.uint8))
    return bool(np.all(values == values[0]))


def collected(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which have one shape, stacked along a new first dim; a collective behind a barrier.

    It does not use the key-value store, in which other programs could read and replace the values.
    """
    if jax.process_count() == 1:
        return values[None]
    agree(True, "a comparison")
    return multihost_utils.process_allgather(values)


def connect(mesh: jax.sharding.Mesh) -> None:
    """Connects the CPU devices of all processes along every set of mesh axes; all processes must call it.

    Does nothing on GPUs: NCCL has no such time limit, and a communicator takes memory.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    groups = [group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)]
    spread = jax.NamedSharding(mesh, jax.P(tuple(axes)))
    ones = jax.make_array_from_callback((mesh.size,), spread, lambda at: np.ones(mesh.size, np.float32)[at])
    # One after the other, because CPU devices of one process may deadlock in several collectives at a time.
    for group in groups:
        total = jax.shard_map(
            lambda x, group=group: jax.lax.psum(x, group), mesh=mesh, in_specs=spread.spec, out_specs=jax.P(),
            check_vma=False,
        )  # fmt: skip
        compiled = jax.jit(total).lower(ones).compile()
        agree(True, "the first collective")
        compiled(ones).block_until_ready()
    agree(True, "the first collective")
    multihost_utils.process_allgather(np.array(True))


def publish(key: str, value: str, *, seconds: float = 5.0) -> None:
    """Writes a text to the key-value store, replacing an earlier one.

    Raises:
      TimeoutError: process 0 did not answer in time.
      RuntimeError: raised by JAX if the processes are no longer connected.
    """
    client = distributed.global_state.client
    if client is None:
        _own[key] = value
    else:
        _answer(lambda: client.key_value_set(key, value, allow_overwrite=True), seconds)


def published(prefix: str, *, seconds: float = 5.0) -> dict[str, str]:
    """All texts under the path `prefix`: {"0": "a", "1": "b"} for "at" if "at/0" and "at/1" are published.

    Raises: the errors of `publish`.
    """
    client = distributed.global_state.client
    whole = prefix.rstrip("/") + "/"
    found = _own.items() if client is None else _answer(lambda: client.key_value_dir_get(whole), seconds)
    return {key.removeprefix(whole): value for key, value in list(found) if key.startswith(whole)}


def leave(code: int, *, seconds: float = 20.0) -> NoReturn:
    """Ends this process with an exit code, without JAX's shutdown barrier, which waits for all processes.

    Other processes that wait for this one in a collective then fail instead of hanging. Process 0 exits last, or after
    `seconds`, because JAX aborts processes that lose the key-value store.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(TimeoutError, RuntimeError):
        if count() > 1:
            publish(f"{LEFT}/{index()}", str(code))
        deadline = time.monotonic() + seconds
        while index() == 0 and len(published(LEFT).keys() - {"0"}) < count() - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1 if index() == 0 and count() > 1 else 0)  # the others publish just before they end
    os._exit(code)


def _check_service() -> None:
    if not jax.config.jax_enable_preemption_service:
        raise UserError(
            "JAX_ENABLE_PREEMPTION_SERVICE is off, and without JAX's preemption service several processes cannot save "
            "and stop after the same step: unset it."
        )


def _check_present(missing: list[int], what: str) -> None:
    """Raises RuntimeError if one of the processes that are waited for has ended."""
    with contextlib.suppress(TimeoutError):
        left = published(LEFT)
        for process in missing:
            if str(process) in left:
                code = left[str(process)]
                raise RuntimeError(f"process {process} has ended with exit code {code}, and did not come to {what}")


def _persistently[T](ask: Callable[[], T], until: float) -> T:
    """Returns `ask()`; repeats it until a time if process 0 does not answer."""
    while True:
        try:
            return ask()
        except TimeoutError:
            if time.monotonic() > until:
                raise


def _given(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """(coordinator address, number of processes, index of this process) from the environment."""
    found = {name: environment[name] for name in GIVEN if environment.get(name)}
    if missing := [name for name in GIVEN if name not in found]:
        raise UserError(
            f"{', '.join(found) or GIVEN[0]} is set, but not {' and '.join(missing)}: set all three, or none."
        )
    address, count, index = found.values()
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; wanted host:port of process 0.")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID {index!r}; wanted 0 <= id < number.")
    return address, int(count), int(index)


def _answer[T](ask: Callable[[], T], seconds: float) -> T:
    """Calls `ask` in a thread, with a timeout: JAX has none, and process 0 may not answer."""
    answers: list[T] = []
    errors: list[Exception] = []

    def wait() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=wait, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"process 0 did not answer within {seconds:g} s")
    return answers[0]
