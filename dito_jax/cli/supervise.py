"""`dito supervise CONFIG`: train.py in several processes, restarted on failure."""

import argparse
import sys
from pathlib import Path

from dito_jax import bundled
from dito_jax.config import load, resolved
from dito_jax.errors import UserError
from dito_jax.overrides import override
from dito_jax.resilience.supervisor import Patience, Supervisor
from dito_jax.resilience.workers import make_workers
from dito_jax.run.elastic import shrunk
from dito_jax.telemetry.events import read_events
from dito_jax.telemetry.run_directory import RunDirectory


def main(options: argparse.Namespace) -> None:
    """Trains, restarts from the last checkpoint on failure, and goes on with fewer processes if one is lost."""
    config = override(load(options.config), options.overrides)  # so that a mistake is reported before any start
    run = RunDirectory(options.run_dir or f"runs/{Path(options.config).stem}")
    where = make_workers(options.processes, options.hosts)

    def shrink(left: int) -> tuple[int, list[str]]:
        started = [row for row in read_events(run, "start") if row["processes"] == len(where)]
        if not started:
            raise UserError(
                f"{run.path}: no start of it has recorded how many devices a process has; it cannot go on with fewer."
            )
        each = started[-1]["devices"] // started[-1]["processes"]
        return shrunk(resolved(config), devices_each=each, before=len(where), left=left)

    command = [sys.executable, str(bundled.TRAIN), options.config, *options.overrides, "--run-dir", str(run.path)]
    patience = Patience(stop=config.watchdog.grace_seconds + 60)
    supervisor = Supervisor(command, run, where, shrink, remote_shell=options.remote_shell, patience=patience)
    sys.exit(supervisor.supervise())
