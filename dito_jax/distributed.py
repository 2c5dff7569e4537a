"""Several processes of one run: how they join, what they tell each other, and what they agree on.

Joined, they share a store of texts that process 0 keeps: what one publishes, all can read, also while their devices
are stuck. A single process keeps its own.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # the store is JAX's own; this file alone knows where JAX has it
from jax.experimental import multihost_utils

from dito_jax.errors import UserError


GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
DETECTED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # clusters whose other variables JAX reads itself
HEARTBEAT_SECONDS = 30  # after which JAX takes a silent process for dead, and ends the others

_own: dict[str, str] = {}


def join() -> None:
    """Joins the processes of one run if the environment says that there are several; call it before any device is used.

    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or Slurm's or Open MPI's variables. It
    returns when all have joined.

    Raises:
      UserError: the three are incomplete, or no numbers.
    """
    if any(name in os.environ for name in GIVEN):
        address, count, index = _given(os.environ)
        if count > 1:
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1 for name in DETECTED):
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def count() -> int:
    """How many processes the run has; unlike `jax.process_count`, it starts no device."""
    return distributed.global_state.num_processes


def index() -> int:
    """Which of them this is; unlike `jax.process_index`, it starts no device."""
    return distributed.global_state.process_id


def agree(value: bool) -> bool:
    """True if all processes say so. All must ask; it also waits for the last of them."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def publish(key: str, value: str, *, seconds: float = 5.0) -> None:
    """Puts a text where all processes can read it, over the one that was there.

    Raises:
      TimeoutError: process 0 did not answer in time.
      RuntimeError: JAX's error; the processes are no longer joined.
    """
    client = distributed.global_state.client
    if client is None:
        _own[key] = value
    else:
        _answer(lambda: client.key_value_set(key, value, allow_overwrite=True), seconds)


def published(prefix: str, *, seconds: float = 5.0) -> dict[str, str]:
    """Every text under `prefix`, a whole path: {"0": "a", "1": "b"} for "at" where "at/0" and "at/1" are published.

    Raises: as `publish`.
    """
    client = distributed.global_state.client
    whole = prefix.rstrip("/") + "/"
    found = _own.items() if client is None else _answer(lambda: client.key_value_dir_get(whole), seconds)
    return {key.removeprefix(whole): value for key, value in list(found) if key.startswith(whole)}


def leave(code: int, *, seconds: float = 20.0) -> NoReturn:
    """Ends this process with an exit code and without JAX's farewell, which waits for all processes to be done.

    So those that wait for this one in a collective hear of it. Process 0 goes when the others have, or after `seconds`:
    JAX aborts whoever loses its store.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(TimeoutError, RuntimeError):
        if index() != 0:
            publish(f"left/{index()}", str(code))
        deadline = time.monotonic() + seconds
        while index() == 0 and len(published("left")) < count() - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1 if index() == 0 and count() > 1 else 0)  # they publish, then end
    os._exit(code)


def _given(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """Address, number of processes, and which of them this is."""
    found = {name: environment[name] for name in GIVEN if environment.get(name)}
    if missing := [name for name in GIVEN if name not in found]:
        raise UserError(f"{', '.join(found) or GIVEN[0]} is set, {' and '.join(missing)} not: set all three, or none.")
    address, count, index = found.values()
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; wanted host:port of process 0.")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID {index!r}; wanted 0 <= id < number.")
    return address, int(count), int(index)


def _answer[T](ask: Callable[[], T], seconds: float) -> T:
    """What `ask` returns or raises. JAX sets no time limit: process 0 may be frozen, and a thread waits for it."""
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
