"""What attends a run while it trains: the account of its time, its events, a watchdog, the request to stop, drills."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from dito_jax.training.events import Events, write_incidents
from dito_jax.training.faults import Faults, FaultsConfig
from dito_jax.training.goodput import Ledger, Phases
from dito_jax.training.heartbeat import Heartbeat, read_beat
from dito_jax.training.preemption import Preemption
from dito_jax.training.run_directory import RunDirectory
from dito_jax.training.watchdog import Watchdog, WatchdogConfig


@dataclasses.dataclass(frozen=True)
class Attendance:
    """Those who attend, in this process."""

    ledger: Phases
    events: Events
    preemption: Preemption
    faults: Faults


@contextlib.contextmanager
def attended(run: RunDirectory, watchdog: WatchdogConfig, faults: FaultsConfig) -> Iterator[Attendance]:
    """Attends a run until the block ends, however it ends."""
    process = jax.process_index()
    own = RunDirectory(run.path)  # where every process may write what concerns itself
    path = run.heartbeats / str(process)
    previous = read_beat(path)
    drills = Faults(faults, own, process=process)
    heartbeat = Heartbeat(path)
    ledger = Ledger(run, heartbeat, previous=previous) if run.writes else Phases(heartbeat)
    with contextlib.ExitStack() as stack:
        stack.callback(heartbeat.close)
        stack.callback(write_incidents, run)
        stack.callback(ledger.close)
        dog = stack.enter_context(Watchdog(heartbeat, own, Events(own, process=process), watchdog, process=process))
        preemption = stack.enter_context(Preemption(watchdog.grace_seconds, on_request=dog.expect_within))
        drills.begin()
        yield Attendance(ledger, Events(run, process=process), preemption, drills)
