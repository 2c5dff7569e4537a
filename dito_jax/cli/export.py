"""`dito export RUN --what sampler -o DIR`, and `dito export verify DIR`: artifacts for processes without this code."""

import argparse
import json
from pathlib import Path

import jax

from dito_jax.config import to_json
from dito_jax.errors import UserError
from dito_jax.interop import artifact
from dito_jax.interop.export import exported_denoiser, exported_sampler, exported_train_step
from dito_jax.interop.manifest import check_replaceable
from dito_jax.run import saved_run


def main(options: argparse.Namespace) -> None:
    """Writes a run's network, sampler or train step as StableHLO with weights, or verifies such an artifact."""
    if options.run == "verify":
        if options.directory is None:
            raise UserError("export verify: got no directory; give that of an artifact.")
        print(artifact.verify(Path(options.directory)))
        return
    if options.directory is not None:
        raise UserError(f"export: unexpected {options.directory!r}; where to write goes behind -o.")
    here = jax.default_backend().replace("gpu", "cuda")
    platforms = options.platform or [here]
    if here not in platforms:  # what is written is run once, to be checked
        told = ",".join(platforms)
        raise UserError(f"export: --platform {told} on a machine that has {here}; add it: {here},{told}.")
    run, config = saved_run.opened(options.run)
    if options.what == "train_step" and config.privacy.epsilon is not None:
        raise UserError(
            f"export: {run.path} is a private run, whose steps only train.py takes: its ledger counts them. "
            "Its sampler and denoiser can be exported."
        )
    out = Path(options.out or run.path / "export" / options.what)
    check_replaceable(out)
    program, state, step = saved_run.restored_here(run, config)
    average, graph = saved_run.sampled_ema(state, config), program.graph
    if options.what == "denoiser":
        made = exported_denoiser(graph, average, config.model, platforms)
    elif options.what == "sampler":
        made = exported_sampler(graph, average, config.model, config.sample, config.loss.prediction, platforms)
    else:
        made = exported_train_step(program, state, platforms)
    about = {"what": options.what, "run": run.path.name, "step": step, "config": json.loads(to_json(config))}
    artifact.write(out, *made, about)
    print(artifact.verify(out))
