"""The `dito` command: one subcommand a verb.

dito sample RUN --num 64 --seed 0 --class 3 7      a PNG grid and an npz from the last checkpoint
dito eval RUN                                      eval.json, report.md and samples/final.png again
dito supervise CONFIG --processes 8 --run-dir RUN  train.py, started again whenever it ends before its time
dito checkpoint ls|show|verify|bench RUN           what its checkpoints hold, whether they are good, a save's cost
dito goodput RUN                                   where its time went: a table, and RUN/goodput.png
dito digest RUN --step 500                         the last line is a hash of its parameters and averages
dito hlo CONFIG --gpus 8xh200                      the compiled train step, and a page to read it by
dito privacy plan CONFIG | ledger DATASET          what noise a budget takes, and what was spent of one
dito export RUN --what sampler -o DIR              StableHLO with weights, for processes without this code
dito block CONFIG --images 32 --gpus 1xh200        what each fusion is worth in one block of the model
dito doctor                                        versions, devices, what runs here and why not
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from dito_jax import config as configs
from dito_jax.checkpointing.checkpoint import Checkpoints, digest
from dito_jax.checkpointing.report import contents, listing, save_cost, verified
from dito_jax.cli import export as cli_export, privacy as cli_privacy
from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.evaluation.expert_load import make_load_meter
from dito_jax.evaluation.final_evaluation import final_evaluation, visible
from dito_jax.evaluation.plots import image_grid
from dito_jax.evaluation.sample import balanced_labels, make_sampler
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.planning.block import measure, table
from dito_jax.planning.doctor import diagnosis
from dito_jax.planning.hlo import page
from dito_jax.planning.lowering import lower_step, planned_devices, planned_mesh
from dito_jax.resilience.supervisor import Supervisor, make_workers
from dito_jax.run import command_line
from dito_jax.run.elastic import shrunk
from dito_jax.run.recipe import planned_program
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.events import read_events
from dito_jax.telemetry.goodput_report import read_accounts, table as goodput_table, timeline
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import Program


def main() -> None:
    """The entry point."""
    command_line.run(
        lambda: _parsed(sys.argv[1:]),
        lambda options: VERBS[options.verb](options),
        computes=lambda options: options.verb != "supervise",  # its processes do, perhaps on other machines
    )


def sample(options: argparse.Namespace) -> None:
    """Draws images from a run's last checkpoint into RUN/samples."""
    run, config = command_line.opened(options.run)
    labels = options.classes or list(range(config.model.num_classes))
    for label in labels:
        if not 0 <= label < config.model.num_classes:
            raise UserError(f"--class {label}: this model has the classes 0 to {config.model.num_classes - 1}.")
    if options.num < 1:
        raise UserError(f"--num {options.num}: wanted at least 1.")
    program, state, step = command_line.restored_here(run, config)
    labels = [labels[i] for i in balanced_labels(options.num, len(labels))]
    images = _sampler(program, config)(command_line.sampled_ema(state, config), labels, options.seed)
    stem = run.samples / f"step_{step}_seed_{options.seed}"
    image_grid(visible(images), stem.with_suffix(".png"))
    np.savez(stem.with_suffix(".npz"), images=images, labels=np.array(labels, np.int32))
    print(f"{stem}.png, {stem}.npz")


def evaluate(options: argparse.Namespace) -> None:
    """Judges a run's last checkpoint again."""
    run, config = command_line.opened(options.run)
    program, state, step = command_line.restored_here(run, config)
    figures = final_evaluation(
        run, _sampler(program, config), command_line.sampled_ema(state, config),
        config.data.open("train"), config.data.open("validation"),
        sample=config.sample, evaluation=config.evaluation, seed=config.train.seed,
        load=make_load_meter(program.graph, config.model, seed=config.train.seed),
        private=config.privacy.epsilon is not None,
    )  # fmt: skip
    for name, value in (figures or {}).items():
        print(f"{name}: {value}")
    print(f"step {step}: {run.report if figures else run.samples / 'final.png'}")


def print_digest(options: argparse.Namespace) -> None:
    """Hashes the parameters and averages of a checkpoint."""
    run, config = command_line.opened(options.run)
    _, state, step = command_line.restored_here(run, config, options.step)
    print(f"{run.path}: step {step}")
    print(digest({"params": state.params, "ema": state.ema}))


def supervise(options: argparse.Namespace) -> None:
    """Trains, and starts again what ends before its time: from the last checkpoint, in fewer places if one is lost."""
    config = configs.override(configs.load(options.config), options.overrides)  # a mistake is told before any start
    run = RunDirectory(options.run_dir or f"runs/{Path(options.config).stem}")
    where = make_workers(options.processes, options.hosts)

    def shrink(left: int) -> tuple[int, list[str]]:
        started = [row for row in read_events(run, "start") if row["processes"] == len(where)]
        if not started:
            raise UserError(f"{run.path}: it never came so far as to say how many devices a process has.")
        each = started[-1]["devices"] // started[-1]["processes"]
        return shrunk(config, devices_each=each, before=len(where), left=left)

    train = str(Path(__file__).parent.parent / "train.py")
    command = [sys.executable, train, options.config, *options.overrides, "--run-dir", str(run.path)]
    sys.exit(Supervisor(command, run, where, shrink, remote_shell=options.remote_shell).supervise())


def checkpoint(options: argparse.Namespace) -> None:
    """Lists a run's checkpoints, shows one, verifies every value of all, or times a save."""
    run, config = command_line.opened(options.run)
    checkpoints = Checkpoints(run.checkpoints, dataclasses.replace(config.checkpoint, verify="full"))
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
            raise UserError(
                f"{wrong} of {len(checkpoints.steps())} checkpoints are damaged; training passes them over."
            )


def goodput(options: argparse.Namespace) -> None:
    """Tells where the time of a run went, over all its starts, and draws it."""
    run = RunDirectory(options.run)
    accounts = read_accounts(run)
    if accounts is None:
        raise UserError(f"{run.path}: no {run.goodput.name} here; give a directory that train.py made.")
    timeline(accounts, picture := run.goodput.with_suffix(".png"))
    print(f"{goodput_table(accounts)}\n{picture}")


def hlo(options: argparse.Namespace) -> None:
    """Writes the train step of a config as text, and a page about it."""
    config = configs.override(configs.load(options.config), options.overrides)
    mesh = planned_mesh(config.mesh, options.gpus)
    configs.check(config, mesh.size)
    where = options.gpus or f"{mesh.size}x{mesh.devices.flat[0].device_kind}"
    out = Path(options.out or f"runs/hlo/{Path(options.config).stem}_{where}")
    with jax.set_mesh(mesh):
        program = planned_program(config, mesh)
        lowered = lower_step(program, options.stage)
    text = out / f"train_step.{options.stage}.txt"
    out.mkdir(parents=True, exist_ok=True)
    text.write_text(lowered.text)
    print(text)
    if options.stage == "optimized":
        (out / "report.md").write_text(page(f"{Path(options.config).stem} on {where}", lowered))
        print((out / "report.md").read_text())
        print(out / "report.md")


def block(options: argparse.Namespace) -> None:
    """Times one block of a config's model, forward and backward, under each choice of kernels."""
    config = configs.override(configs.load(options.config), options.overrides)
    if options.images < 1:
        raise UserError(f"--images {options.images}: wanted at least 1.")
    if isinstance(config.model, MoEDiTConfig):
        raise UserError(f"{options.config}: blocks with experts are not compared here; give a config of a dense DiT.")
    if problems := config.model.problems():
        raise UserError("; ".join(f"model: {problem}" for problem in problems) + ".")
    mesh = make_mesh(MeshConfig(), planned_devices(options.gpus)[:1])
    where = mesh.devices.flat[0].device_kind
    if mesh.devices.flat[0].platform == "cpu":
        raise UserError("block: kernels need an NVIDIA GPU; here they can be compiled for one: --gpus 1xh200.")
    tokens = config.model.grid[0] * config.model.grid[1]
    title = f"One block of {Path(options.config).stem}, {options.images} images of {tokens} tokens, on {where}"
    print(table(measure(config.model, options.images, mesh), title))


def doctor(_: argparse.Namespace) -> None:
    """Says what this machine has and what runs on it."""
    print(diagnosis())


def _sampler(program: Program, config: TrainConfig) -> Callable[..., np.ndarray]:
    return make_sampler(program.graph, config.model, config.sample, config.loss.prediction)


class _Parser(argparse.ArgumentParser):
    """Argparse, but a mistake is one line and names what was meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. `{self.prog} --help` lists what there is.")


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "supervise": supervise, "sample": sample, "eval": evaluate, "checkpoint": checkpoint, "goodput": goodput,
    "digest": print_digest, "export": cli_export.run_export, "hlo": hlo, "block": block,
    "privacy": cli_privacy.privacy, "doctor": doctor,
}  # fmt: skip


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its options."""
    parser = _Parser(prog="dito", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    parsers = {
        name: verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        for name, function in VERBS.items()
    }
    parsers["checkpoint"].add_argument("what", choices=("ls", "show", "verify", "bench"))
    cli_privacy.add_arguments(parsers["privacy"])
    cli_export.add_arguments(parsers["export"])
    for name in ("sample", "eval", "checkpoint", "goodput", "digest"):
        parsers[name].add_argument("run", help="a run directory, e.g. runs/digits")
    parsers["sample"].add_argument("--num", type=int, default=64)
    parsers["sample"].add_argument("--seed", type=int, default=0)
    parsers["sample"].add_argument("--class", dest="classes", type=int, nargs="+", help="classes to draw; default: all")
    for name in ("digest", "checkpoint"):
        parsers[name].add_argument("--step", type=int, help="default: the last")
    parsers["supervise"].add_argument("--processes", type=int, default=1, help="on this machine")
    parsers["supervise"].add_argument("--hosts", nargs="+", default=[], help="machines, a process each")
    parsers["supervise"].add_argument("--remote-shell", default="ssh", help="how a command is run on a host")
    parsers["supervise"].add_argument("--run-dir", help="default runs/CONFIG")
    for name in ("supervise", "hlo", "block"):
        parsers[name].add_argument("config", help="a config file")
    for name in ("hlo", "block"):
        parsers[name].add_argument("--gpus", help="compile for GPUs that are not here, e.g. 1xh200, 8xh100")
    parsers["block"].add_argument("--images", type=int, default=32)
    parsers["hlo"].add_argument("--stage", choices=("jaxpr", "stablehlo", "optimized"), default="optimized")
    parsers["hlo"].add_argument("--out", help="directory; default runs/hlo/CONFIG_GPUS")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(VERBS)}."
        raise UserError(f"no verb {arguments[0]!r}; {hint}")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in ("supervise", "hlo", "block", "privacy"):
        raise UserError(f"{options.verb}: no option {rest[0]}. `dito {options.verb} --help` lists what there is.")
    options.overrides = rest
    return options


if __name__ == "__main__":
    main()
