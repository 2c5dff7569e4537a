"""`dito digest RUN`: a hash of a checkpoint."""

import argparse

from dito_jax.checkpointing.checkpoint import digest
from dito_jax.run import saved_run


def main(options: argparse.Namespace) -> None:
    """Prints the SHA-256 of the parameters and EMA parameters of a checkpoint."""
    run, config = saved_run.opened(options.run)
    _, state, step = saved_run.restored_here(run, config, options.step)
    print(f"{run.path}: step {step}")
    print(digest({"params": state.params, "ema": state.ema}))
