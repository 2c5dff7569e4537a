"""`dito checkpoint ls|show|verify|bench RUN`."""

import argparse

from dito_jax.checkpointing.report import contents, listing, save_cost, verified
from dito_jax.errors import UserError
from dito_jax.run import saved_run


def main(options: argparse.Namespace) -> None:
    """Lists a run's checkpoints, shows one, verifies every value of all, or times a save."""
    run, config = saved_run.opened(options.run)
    checkpoints = saved_run.checkpoints_of(run, config, verify="full")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{run.checkpoints}: no checkpoint yet; wait for one, or train further.")
    if options.what == "ls":
        print(listing(checkpoints))
    elif options.what == "show":
        print(contents(checkpoints, latest if options.step is None else options.step))
    elif options.what == "bench":
        print(save_cost(checkpoints, latest if options.step is None else options.step))
    else:
        wrong = 0
        for step, said in verified(checkpoints):
            print(f"step {step}: {said or 'good'}", flush=True)
            wrong += said is not None
        if wrong:
            raise UserError(f"{wrong} of {len(checkpoints.steps())} checkpoints are not good; the lines above say why.")
