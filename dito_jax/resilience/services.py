"""Services of a training run: goodput records, event log, preemption, watchdog and fault injection."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from dito_jax.resilience.faults import Faults, FaultsConfig
from dito_jax.resilience.preemption import Preemption
from dito_jax.resilience.watchdog import Watchdog, WatchdogConfig
from dito_jax.telemetry.clock import run_clock
from dito_jax.telemetry.events import Events, write_incidents
from dito_jax.telemetry.goodput import Ledger, Phases
from dito_jax.telemetry.heartbeat import Heartbeat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Services:
    """The services that the training loop calls, in this process."""

    ledger: Phases
    events: Events
    preemption: Preemption
    faults: Faults


@contextlib.contextmanager
def run_services(run: RunDirectory, watchdog: WatchdogConfig, faults: FaultsConfig) -> Iterator[Services]:
    """Starts the services of a run; stops them when the block ends, also by an exception."""
    process = jax.process_index()
    own = RunDirectory(run.path)  # every process writes its own files and events
    path = run.heartbeats / str(process)
    previous = read_beat(path)
    injected = Faults(faults, own, process=process)
    clock = run_clock(own)
    heartbeat = Heartbeat(path, clock=clock)
    ledger = Ledger(run, heartbeat, previous=previous, clock=clock) if run.writes else Phases(heartbeat)
    with contextlib.ExitStack() as stack:
        stack.callback(heartbeat.close)
        stack.callback(write_incidents, run)
        stack.callback(ledger.close)
        hang_watchdog = stack.enter_context(
            Watchdog(heartbeat, own, Events(own, process=process), watchdog, process=process)
        )
        preemption = stack.enter_context(Preemption(watchdog.grace_seconds, on_request=hang_watchdog.expect_within))
        injected.begin()
        yield Services(ledger, Events(run, process=process), preemption, injected)
