"""`dito export RUN --what sampler -o DIR`, and `dito export verify DIR`: artifacts for processes without this code."""

import argparse
import json
from pathlib import Path

import jax

from dito_jax.config import to_json
from dito_jax.errors import UserError
from dito_jax.interop import artifact
from dito_jax.interop.export import exported_denoiser, exported_sampler, exported_train_step
from dito_jax.run import command_line


PLATFORMS = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("run", metavar="RUN|verify")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="verify: the artifact")
    parser.add_argument("--what", choices=("denoiser", "sampler", "train_step"), default="sampler")
    parser.add_argument(
        "--platform", metavar="P[,P]", type=_platforms, help="cpu, cuda, or both; default: what is here"
    )
    parser.add_argument("-o", "--out", metavar="DIR", help="default: RUN/export/WHAT")


def run_export(options: argparse.Namespace) -> None:
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
    run, config = command_line.opened(options.run)
    if options.what == "train_step" and config.privacy.epsilon is not None:
        raise UserError(
            f"export: {run.path} is a private run, whose steps only train.py takes: its ledger counts them. "
            "Its sampler and denoiser can be exported."
        )
    out = Path(options.out or run.path / "export" / options.what)
    if out.exists() and not out.is_dir():
        raise UserError(f"export: -o {out} is a file; give a directory.")
    program, state, step = command_line.restored_here(run, config)
    average, graph = command_line.sampled_ema(state, config), program.graph
    if options.what == "denoiser":
        made = exported_denoiser(graph, average, config.model, platforms)
    elif options.what == "sampler":
        made = exported_sampler(graph, average, config.model, config.sample, config.loss.prediction, platforms)
    else:
        made = exported_train_step(program, state, platforms)
    about = {"what": options.what, "run": run.path.name, "step": step, "config": json.loads(to_json(config))}
    artifact.write(out, *made, about)
    print(artifact.verify(out))


def _platforms(told: str) -> list[str]:
    platforms = list(dict.fromkeys(told.split(",")))
    if not set(platforms) <= set(PLATFORMS):
        raise argparse.ArgumentTypeError(f"{told!r} is not of {','.join(PLATFORMS)}.")
    return platforms
