"""What attends a run while it trains: the account of its time, its events, a watchdog, the request to stop, drills."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from dito_jax.resilience.faults import Faults, FaultsConfig
from dito_jax.resilience.preemption import Preemption
from dito_jax.resilience.watchdog import Watchdog, WatchdogConfig
from dito_jax.telemetry.events import Events, write_incidents
from dito_jax.telemetry.goodput import Ledger, Phases
from dito_jax.telemetry.heartbeat import Heartbeat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Services:
    """Those who attend, in this process."""

    ledger: Phases
    events: Events
    preemption: Preemption
    faults: Faults


@contextlib.contextmanager
def run_services(run: RunDirectory, watchdog: WatchdogConfig, faults: FaultsConfig) -> Iterator[Services]:
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
        yield Services(ledger, Events(run, process=process), preemption, drills)
