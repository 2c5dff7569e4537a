"""Trains a diffusion transformer: the whole run on one page, in the order in which it happens.

    python train.py configs/digits.py
    python train.py configs/digits.py --train.steps 200 --checkpoint.every 50 --run-dir runs/short
    python train.py configs/digits.py --help

The run directory (default runs/<config name>) holds config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/,
and at the end eval.json and report.md. Where it holds a checkpoint the run goes on from there, bit for bit; options
other than before are taken over and change what follows.
Exit code 0: done. 2: the user's mistake, in one line. 130: interrupted. Anything else is a bug.
"""

import sys

import jax
import numpy as np

from dito_jax import command_line
from dito_jax.config import TrainConfig, check, to_json
from dito_jax.data import batches
from dito_jax.evaluation.expert_load import make_load_meter
from dito_jax.evaluation.judge import judge
from dito_jax.evaluation.sample import make_sampler
from dito_jax.sharding import make_mesh
from dito_jax.training.checkpoint import Checkpoints
from dito_jax.training.compiling import compile_step, enable_compilation_cache
from dito_jax.training.metrics import MetricsWriter
from dito_jax.training.optimizer import learning_rate
from dito_jax.training.program import Program, make_program
from dito_jax.training.progress import Progress
from dito_jax.training.run_directory import RunDirectory
from dito_jax.training.state import TrainState
from dito_jax.training.throughput import Throughput


def main(arguments: tuple[TrainConfig, RunDirectory]) -> None:
    config, run = arguments
    check(config, jax.device_count())
    enable_compilation_cache(command_line.cache_directory())
    mesh = make_mesh(config.mesh)
    with run.hold(), jax.set_mesh(mesh):
        program = make_program(config.model, config.loss, config.optimizer, config.train, mesh)
        state = train(config, run, program)
        finish(config, run, program, state)


def train(config: TrainConfig, run: RunDirectory, program: Program) -> TrainState:
    # ------------------------------------------------------------------------------------------------------------ data
    source = config.data.open("train")
    command_line.check_data(config, source)
    stream = batches(
        source, batch_size=config.train.batch_size, seed=config.train.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip

    # ----------------------------------------------------------------------------------------------- state, or restore
    checkpoints = Checkpoints(run.checkpoints, keep=config.checkpoint.keep)
    restored = checkpoints.latest()
    if restored is None:
        state = command_line.first_state(config, program, jax.sharding.get_mesh())
    else:
        state = checkpoints.restore(restored, program.state, stream)
    run.write_text("config.json", to_json(config))
    first = restored or 0
    print(f"{run.path}: {config.model.num_parameters():,} parameters, {len(source):,} training images, "
          f"{jax.device_count()} x {jax.devices()[0].device_kind}, from step {first}", file=sys.stderr)  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- compile
    step, compiled = compile_step(program.step, program.state, program.batch)
    print(compiled.line(), file=sys.stderr)
    throughput = Throughput(
        images_per_step=config.train.batch_size,
        flops_per_step=3 * config.model.flops() * config.train.batch_size,  # the backward is two forwards
        dtype=config.train.compute_dtype,
    )
    rate = learning_rate(config.optimizer, config.train.steps)

    # ------------------------------------------------------------------------------------------------------------ loop
    with MetricsWriter(run, after=restored) as metrics:
        if first < config.train.steps:
            metrics.write(first + 1, compiled.asdict())
        progress = Progress(config.train.steps, step=first)
        pending = []  # metrics still on the device: fetched once an interval, so that steps are queued without a wait
        for number in range(first + 1, config.train.steps + 1):
            batch = jax.tree.map(
                lambda leaf, share: jax.make_array_from_process_local_data(leaf.sharding, share),
                program.batch, next(stream),
            )  # fmt: skip
            state, measured = step(state, batch)
            pending.append(measured)
            last = number == config.train.steps
            if number % config.train.log_every == 0 or last:
                fetched = jax.device_get(pending)
                means = {name: float(np.mean([m[name] for m in fetched])) for name in measured}
                speed = throughput.interval(len(pending))
                metrics.write(number, means | speed | {"learning_rate": np.asarray(rate(number - 1)).item()})
                shown = {"loss": means["loss"]} | speed
                progress.show(number, {name: value for name, value in shown.items() if value is not None})
                pending = []
            if number % config.checkpoint.every == 0 or last:
                checkpoints.save(number, state, stream, metadata={"config": to_json(config)})
        progress.close()
    checkpoints.close()
    return state


def finish(config: TrainConfig, run: RunDirectory, program: Program, state: TrainState) -> None:
    # --------------------------------------------------------------------------------------------- samples, evaluation
    draw = make_sampler(program.graph, config.model, config.sample, config.loss.prediction)
    decay = config.sample.ema_decay or config.train.ema_decays[0]
    figures = judge(
        run, draw, state.ema[str(decay)], config.data.open("train"), config.data.open("heldout"),
        sample=config.sample, evaluation=config.evaluation, seed=config.train.seed,
        load=make_load_meter(program.graph, config.model, seed=config.train.seed),
    )  # fmt: skip
    if figures is not None:
        agreement, of_heldout = figures["class_agreement"], figures["class_agreement_of_heldout"]
        print(f"class agreement {agreement:.3f} (held-out data {of_heldout:.3f})")
    print(f"done: look at {run.samples / 'final.png'}")


if __name__ == "__main__":
    command_line.run(lambda: command_line.train_arguments(sys.argv[1:]), main)
