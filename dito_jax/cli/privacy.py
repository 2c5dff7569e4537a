"""`dito privacy plan|cost|ledger|card|audit|utility`; cli/arguments.py says what each is for."""

import argparse
import dataclasses
import functools
import typing
from pathlib import Path

import jax

from dito_jax.cli.audit import audit
from dito_jax.cli.utility import compare
from dito_jax.config import TrainConfig, check, load, resolved
from dito_jax.errors import UserError
from dito_jax.overrides import override
from dito_jax.planning.lowering import planned_mesh
from dito_jax.planning.step_cost import STEPS, costs, table
from dito_jax.privacy.accounting import epsilon, noise_multiplier, remaining_steps
from dito_jax.privacy.card import markdown
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.run import max_batch, units_of
from dito_jax.privacy.settings import Backend
from dito_jax.run import saved_run
from dito_jax.run.privacy_card import card_of
from dito_jax.run.recipe import planned_program
from dito_jax.sharding import batch_pieces
from dito_jax.training.program import Program


EPSILONS = (1.0, 3.0, 10.0)


def main(options: argparse.Namespace) -> None:
    """Prints what the chosen one finds."""
    print(VERBS[options.what](options))


def _plan(options: argparse.Namespace) -> str:
    config = resolved(override(load(options.subject), options.overrides))
    wanted = config.privacy.epsilon if options.epsilon is None else options.epsilon
    if wanted is None:
        raise UserError("privacy plan: no epsilon; give --epsilon 8, or privacy.epsilon in the config.")
    delta = config.privacy.delta if options.delta is None else options.delta
    units = len(units_of(config.data.open("train"), config.privacy)) + config.canaries // 2
    unit = "image" if config.privacy.images_per_user is None else "user"
    room = config.privacy.max_batch if (config.privacy.max_batch or units) < units else None
    batch, steps = config.train.batch_size, config.train.steps + config.privacy.spare_steps
    of_them = (
        f", with half of {config.canaries} canaries, each included with probability 1/2" if config.canaries else ""
    )
    lines = [
        f"{options.subject}: {units} {unit}s{of_them}, delta {delta:g}.",
        "The mean gradient has noise sigma/batch, in clip norms.",
        *([f"Batches of {batch} are cut at {room}, which a run rounds up to its devices."] if room else []),
        "",
        "| epsilon | batch | steps | sigma | sigma/batch |",
        "|---|---|---|---|---|",
    ]
    same_work = [(batch, steps), *((batch * k, max(steps // k, 1)) for k in (2, 4) if batch * k <= units)]
    for of_epsilon in sorted({wanted, *EPSILONS}):
        for expected, count in same_work if of_epsilon == wanted else same_work[:1]:
            of_room = room if expected == batch else None
            sigma = noise_multiplier(units, expected, count, of_epsilon, delta, max_batch=of_room)
            lines.append(f"| {of_epsilon:g} | {expected} | {count} | {sigma:.4g} | {sigma / expected:.2e} |")
    return "\n".join(lines)


def _cost(options: argparse.Namespace) -> str:
    """Prints each row when it is measured; returns how the times were measured."""
    config = resolved(override(load(options.subject), options.overrides))
    mesh = planned_mesh(config.mesh, options.gpus)
    batch, parts = config.train.batch_size, config.train.gradient_accumulation_steps
    where = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    recipes, units = _recipes(config), _num_units(config) if options.units is None else options.units
    rows = max_batch(recipes["vmap"].privacy, config.train, units, batch_pieces(mesh.shape) * parts)
    print(
        f"# {Path(options.subject).stem}, batch {batch}, accumulation {parts}, on {where}\n\nA private batch of a data "
        f"set of {units} units has {rows} rows; those that are not drawn are padding, which is computed too.\n",
        flush=True,
    )
    programs = {name: functools.partial(_checked_program, recipe, mesh, units) for name, recipe in recipes.items()}
    for line in table(costs(programs, mesh)):
        print(line, flush=True)
    if options.gpus is not None:
        return "\nTimes are not measured, because these devices are not here. On a machine with them, leave out --gpus."
    return f"\nTimes are medians of {STEPS} steps on a batch of noise."


def _recipes(config: TrainConfig) -> dict[str, TrainConfig]:
    """The config without privacy, and with each DP-SGD implementation, the one with most memory last."""
    asked = config.privacy
    private = dataclasses.replace(asked, epsilon=asked.epsilon or 8.0, dataset=asked.dataset or "x")
    backends = reversed(typing.get_args(Backend))
    return {"not private": dataclasses.replace(config, privacy=dataclasses.replace(asked, epsilon=None))} | {
        name: dataclasses.replace(config, privacy=dataclasses.replace(private, backend=name)) for name in backends
    }


def _num_units(config: TrainConfig) -> int:
    """The number of units of the data set; 1,000 times the batch if it is not on this machine."""
    try:
        return len(units_of(config.data.open("train"), config.privacy))
    except UserError:
        return 1000 * config.train.batch_size


def _checked_program(config: TrainConfig, mesh: jax.sharding.Mesh, num_units: int) -> Program:
    check(config, mesh.size)
    return planned_program(config, mesh, num_units)


def _ledger(options: argparse.Namespace) -> str:
    path = ledger_path(options.subject)
    if not path.exists():
        raise UserError(f"{path}: no ledger of a data set {options.subject!r}; a private run makes it.")
    ledger = Ledger(path)
    if ledger.budget is None:
        raise UserError(f"{path}: empty, with no budget and no run; remove it, and a private run makes another.")
    if options.budget is not None:
        if not 0 < options.budget < float("inf"):
            raise UserError(f"--budget {options.budget}: wanted an epsilon above 0.")
        ledger.set_budget(dataclasses.replace(ledger.budget, epsilon=options.budget))
    budget, spent = ledger.budget, ledger.spent()
    lines = ["| run | starts | steps | q | sigma | epsilon alone |", "|---|---|---|---|---|---|"]
    for run in ledger.runs():
        for release, steps in ledger.spent(run).items():
            alone = epsilon({release: steps}, budget.delta)
            lines.append(
                f"| {run[:8]} | {ledger.restarts(run)} | {steps} | {release.sampling_prob:.4g} | "
                f"{release.noise_multiplier:g} | {alone:.4g} |"
            )
    lines += [
        "",
        f"Spent: epsilon {epsilon(spent, budget.delta):.4g} of {budget.epsilon:g} at delta {budget.delta:g}, unit: one "
        f"{budget.unit}. {ledger.number} entries, chain intact: {path}",
    ]
    if spent:
        last = list(spent)[-1]
        left = remaining_steps(spent, last, budget.epsilon, budget.delta)
        lines.append(f"Left: {left} steps at sigma {last.noise_multiplier:g}.")
    return "\n".join(lines)


def _card(options: argparse.Namespace) -> str:
    run, config = saved_run.opened(options.subject)
    facts = card_of(run, config)
    run.write_json("privacy_card.json", facts)
    run.write_text("privacy_card.md", markdown(facts))
    return markdown(facts).rstrip()


VERBS = {"plan": _plan, "cost": _cost, "ledger": _ledger, "card": _card, "audit": audit, "utility": compare}
