"""`dito goodput RUN`."""

import argparse

from dito_jax.errors import UserError
from dito_jax.telemetry.goodput_report import read_accounts, table, timeline
from dito_jax.telemetry.run_directory import RunDirectory


def main(options: argparse.Namespace) -> None:
    """Prints where the time of a run went, over all restarts, and draws it."""
    run = RunDirectory(options.run)
    accounts = read_accounts(run)
    if accounts is None:
        raise UserError(f"{run.path}: no {run.goodput.name} here; give a directory that train.py made.")
    timeline(accounts, picture := run.goodput.with_suffix(".png"))
    print(f"{table(accounts)}\n{picture}")
