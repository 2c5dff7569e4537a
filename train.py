"""Trains a diffusion transformer: the whole run on one page, in the order in which it happens.

    python train.py configs/digits.py
    python train.py configs/digits.py --train.steps 200 --checkpoint.every 50 --run-dir runs/short
    python train.py configs/digits.py --help

`dito train CONFIG` runs the same main from an installed package. A CONFIG is a file, or the name of a built-in config.

The run directory (default runs/<config name>) holds config.json, classes.json, data.json, run.json, metrics.jsonl,
events.jsonl, goodput.jsonl, tensorboard/, checkpoints/, samples/, and at the end eval.json and report.md. A run
directory that holds a checkpoint is resumed from it, bit for bit; changed options apply from there on.

Several processes train one run where the environment says so (dito_jax/distributed.py); `dito supervise` starts them.
Exit code 0: done. 2: the user's mistake, in one line. 75: asked to stop (SIGTERM, SIGUSR1, SIGINT) and saved. 86: hung.
Anything else is a bug.
"""

import functools
import sys
from pathlib import Path

import jax

from dito_jax.checkpointing.checkpoint import Checkpoints, DamagedCheckpoint
from dito_jax.checkpointing.identity import keep, owner_of
from dito_jax.checkpointing.retention import SaveClock
from dito_jax.config import TrainConfig, check, resolved, to_json
from dito_jax.data import class_names
from dito_jax.distributed import agree, connect, index, join
from dito_jax.errors import Preempted
from dito_jax.evaluation.expert_load import make_load_meter
from dito_jax.evaluation.final_evaluation import final_evaluation
from dito_jax.evaluation.sample import make_batch_sampler
from dito_jax.resilience.data_errors import BatchReader
from dito_jax.resilience.data_position import EXAMPLES, DataPosition
from dito_jax.resilience.guard import Guard, step_back
from dito_jax.resilience.services import Services, run_services
from dito_jax.resilience.skips import finish_rollback
from dito_jax.run import command_line
from dito_jax.run.arguments import train_arguments
from dito_jax.run.initialization import initial_state
from dito_jax.run.loaded_run import CLASSES
from dito_jax.run.monitor import make_monitor
from dito_jax.run.recipe import Recipe, make_recipe
from dito_jax.run.resume import check_first_step, compare_data, recorder
from dito_jax.run.same_start import check_same_start
from dito_jax.run.saved_run import sampled_ema
from dito_jax.sharding import make_mesh
from dito_jax.telemetry.logger import MetricsLogger
from dito_jax.telemetry.metrics import last_compile_seconds
from dito_jax.telemetry.progress import MakeMeter, ProgressMeter
from dito_jax.telemetry.run_directory import FollowedDirectory, RunDirectory
from dito_jax.telemetry.throughput import Throughput
from dito_jax.training.compilation_cache import enable_compilation_cache
from dito_jax.training.compiling import CompileReport, compile_step
from dito_jax.training.optimizer import learning_rate
from dito_jax.training.state import TrainState


def main(arguments: tuple[TrainConfig, RunDirectory]) -> None:
    config, run = arguments
    join()
    config = resolved(config)
    check_same_start(to_json(config), run.checkpoints)
    check(config, jax.device_count())
    enable_compilation_cache(command_line.cache_directory())
    mesh = make_mesh(config.mesh)
    connect(mesh)
    run = run if index() == 0 else FollowedDirectory(run.path)
    with run.hold(), jax.set_mesh(mesh), run_services(run, config.watchdog, config.faults) as services:
        recipe = make_recipe(config, run, mesh)
        meter = functools.partial(ProgressMeter, shown=run.writes, beat=services.ledger.progress)
        state = train(config, run, recipe, services, meter)
        with services.ledger.phase("eval"):
            finish(config, run, recipe, state, meter)


def train(config: TrainConfig, run: RunDirectory, recipe: Recipe, services: Services, meter: MakeMeter) -> TrainState:
    program, source, batches_from = recipe.program, recipe.source, recipe.batches_from
    ledger, events, faults = services.ledger, services.events, services.faults
    # ----------------------------------------------------------------------------------------------- state, or restore
    checkpoints = open_checkpoints(config, run, services)

    def quarantine(step: int, error: DamagedCheckpoint) -> None:
        aside = checkpoints.set_aside(step, "corrupt")
        events.record("quarantine", f"{error} It is kept as {aside.name}.", step=step)

    with ledger.phase("restore"):
        finish_rollback(run, checkpoints, events)
        damaged: list[tuple[int, DamagedCheckpoint]] = []
        restored = checkpoints.restore_newest(program.state, lambda *each: damaged.append(each))
        for each in damaged:  # only now: if no step is intact, none is set aside
            quarantine(*each)
        check_first_step(run, restored[0] if restored else None, config.train.steps)
    first, state = restored or (0, initial_state(config, program, jax.sharding.get_mesh()))
    position = DataPosition(run, config.train.batch_size)
    position.restore(first, checkpoints.metadata(first) if restored else {})
    ledger.resumed(first)
    stream = batches_from(position)  # if a private run's ledger refuses it, nothing of it is written
    compare_data(run, source, events)
    events.record("start", step=first, processes=jax.process_count(), devices=jax.device_count())
    keep(checkpoints.owner, run)
    run.write_text("config.json", to_json(config))
    run.write_json(CLASSES, class_names(source))
    command_line.say(
        f"{run.path}: {config.model.num_parameters():,} parameters, {len(source):,} training images, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, from step {first}"
    )

    # --------------------------------------------------------------------------------------------------------- compile
    with ledger.phase("compile"), meter("compiling the train step", expected=last_compile_seconds(run)):
        step, compiled = compile_step(program.step, program.state, program.batch)
        agree(True, "the first step")  # a process that had it in its cache waits here, and not in a collective
    command_line.say(compiled.line())
    logger = make_logger(config, run, first, compiled)
    monitor = make_monitor(config, run, recipe, meter, lambda: services.preemption.asked)

    # ------------------------------------------------------------------------------------------------------------ loop
    guard, clock = Guard(config.guard, run, events, first=first), SaveClock(config.checkpoint, config.train.log_every)
    reader, number = BatchReader(source, events, checkpoints), first

    def save(number: int) -> None:
        with ledger.phase("save"):
            if guard.compare_processes(number, state):
                run.check_in_place()
                faults.before_save(number)
                about = {"config": to_json(config), "metrics": logger.released, EXAMPLES: position.after(number)}
                checkpoints.save(number, state, metadata=about)
        clock.saved()
        ledger.flush()

    with logger, services.preemption.deferred():
        if monitor.missed(first):
            with ledger.phase("eval"):
                monitor(first, sampled_ema(state, config), logger)
        while number < config.train.steps:
            number += 1
            ledger.step(number)
            faults.before_step(number)
            state = faults.in_memory(number, state)
            with ledger.phase("data"):
                rows = reader.read(stream, number, save)
                batch = program.place(faults.poisoned(number, rows))
            state, measured = step(state, batch)
            if config.guard.rerun and guard.is_bad(measured):
                before = measured
                state, measured = step(step_back(state), program.place(faults.poisoned(number, rows)))
                guard.compare(number, before, measured)
            guard.watch(number, measured)
            if config.guard.check_replicas_every and number % config.guard.check_replicas_every == 0:
                guard.compare_replicas(number, state)
            logger.add(measured)

            last, stop = number == config.train.steps, services.preemption.requested(number)
            if number % config.train.log_every == 0 or last or stop:
                guard.settle()
                logger.log(number)
            if clock.due(number) or last or stop:
                save(number)
            if stop and (guard.diverged or not last):
                checkpoints.close()
                saved = checkpoints.latest() or 0  # an earlier step, if the processes diverged
                raise Preempted(f"asked to stop: step {saved} is saved; the same command goes on from there.")
            if guard.burst():
                del state  # before another takes its place
                with ledger.phase("restore"):
                    number, state = guard.roll_back(number, checkpoints, program.state, quarantine, position)
                ledger.resumed(number)
                logger.rewind(number)
                stream = batches_from(position)
            elif monitor.due(number):
                with ledger.phase("eval"):
                    monitor(number, sampled_ema(state, config), logger)
                ledger.flush()
        with ledger.phase("save"):
            checkpoints.close()
    return state


def open_checkpoints(config: TrainConfig, run: RunDirectory, services: Services) -> Checkpoints:
    events, record_first = services.events, recorder(run, services.events)

    def tell(line: str) -> None:
        events.record("checkpoint", line)

    def on_disk(step: int, path: Path) -> None:
        services.faults.after_save(step, path)
        record_first(step)

    return Checkpoints(
        run.checkpoints, config.checkpoint, owner=owner_of(run, to_json(config), tell=tell), tell=tell,
        on_disk=on_disk, on_change=lambda line: events.record("config_changed", line),
    )  # fmt: skip


def make_logger(config: TrainConfig, run: RunDirectory, first: int, compiled: CompileReport) -> MetricsLogger:
    throughput = Throughput(
        images_per_step=config.train.batch_size,
        flops_per_step=3 * config.model.flops() * config.train.batch_size,  # the backward is two forwards
        dtype=config.train.compute_dtype,
    )
    return MetricsLogger(
        run, total=config.train.steps, first=first, throughput=throughput,
        rate=learning_rate(config.optimizer, config.train.steps), compiled=compiled.asdict(),
        wandb_project=config.monitoring.wandb_project,
    )  # fmt: skip


def finish(config: TrainConfig, run: RunDirectory, recipe: Recipe, state: TrainState, meter: MakeMeter) -> None:
    # --------------------------------------------------------------------------------------------- samples, evaluation
    graph = recipe.program.graph
    draw = make_batch_sampler(graph, config.model, config.sample, config.loss.prediction)
    figures = final_evaluation(
        run, draw, sampled_ema(state, config), config.data.open("train"),
        recipe.validation if config.evaluation.num_samples else None,
        sample=config.sample, evaluation=config.evaluation, seed=config.train.seed,
        load=make_load_meter(graph, config.model, seed=config.train.seed),
        private=config.privacy.epsilon is not None, meter=meter,
    )  # fmt: skip
    if figures is not None:
        agreement, of_validation = figures["class_agreement"], figures["class_agreement_of_validation"]
        print(f"class agreement {agreement:.3f} (held-out data {of_validation:.3f})")
    if run.writes:
        print(f"done: look at {run.samples / 'final.png'}")


if __name__ == "__main__":
    command_line.run(lambda: train_arguments(sys.argv[1:]), main)
