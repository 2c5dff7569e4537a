"""The `dito privacy` verbs.

dito privacy plan CONFIG --epsilon 8      the noise that this budget takes, and what other budgets and batches would
dito privacy ledger DATASET               what was spent of a data set's budget, by run, and what is left
dito privacy ledger DATASET --budget 12   raises or lowers it; the old figure stays on record
dito privacy card RUN                     privacy_card.md and .json: what was promised of a run, and on what grounds
"""

import argparse

from dito_jax import command_line, config as configs
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import epsilon, noise_multiplier, remaining_steps
from dito_jax.privacy.card import card, markdown
from dito_jax.privacy.ledger import Budget, Ledger, ledger_path


EPSILONS = (1.0, 3.0, 10.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("what", choices=tuple(VERBS))
    parser.add_argument("subject", metavar="CONFIG|DATASET|RUN")
    parser.add_argument("--epsilon", type=float, help="plan: default the config's")
    parser.add_argument("--delta", type=float, help="plan: default the config's")
    parser.add_argument("--budget", type=float, help="ledger: a new epsilon")


def privacy(options: argparse.Namespace) -> None:
    """Plans the noise of a private run, shows what was spent of a data set, or what was promised of a run."""
    print(VERBS[options.what](options))


def _plan(options: argparse.Namespace) -> str:
    config = configs.override(configs.load(options.subject), options.overrides)
    wanted = options.epsilon or config.privacy.epsilon
    if wanted is None:
        raise UserError("privacy plan: no epsilon; give --epsilon 8, or privacy.epsilon in the config.")
    delta, units = options.delta or config.privacy.delta, len(config.data.open("train"))
    batch, steps = config.train.batch_size, config.train.steps + config.privacy.spare_steps
    lines = [
        f"{options.subject}: {units} images, delta {delta:g}. The mean gradient has noise sigma/batch, in clip norms.",
        "",
        "| epsilon | batch | steps | sigma | sigma/batch |",
        "|---|---|---|---|---|",
    ]
    same_work = [(batch, steps), *((batch * k, max(steps // k, 1)) for k in (2, 4) if batch * k <= units)]
    for of_epsilon in sorted({wanted, *EPSILONS}):
        for expected, count in same_work if of_epsilon == wanted else same_work[:1]:
            sigma = noise_multiplier(units, expected, count, of_epsilon, delta)
            lines.append(f"| {of_epsilon:g} | {expected} | {count} | {sigma:.4g} | {sigma / expected:.2e} |")
    return "\n".join(lines)


def _ledger(options: argparse.Namespace) -> str:
    path = ledger_path(options.subject)
    if not path.exists():
        raise UserError(f"{path}: no ledger of a data set {options.subject!r}; a private run makes it.")
    ledger = Ledger(path)
    if options.budget is not None:
        old = ledger.budget
        assert old is not None
        ledger.set_budget(Budget(options.budget, old.delta, old.unit))
    budget, spent = ledger.budget, ledger.spent()
    assert budget is not None
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
    run, config = command_line.opened(options.subject)
    facts = card(run, config.privacy)
    run.write_json("privacy_card.json", facts)
    run.write_text("privacy_card.md", markdown(facts))
    return markdown(facts).rstrip()


VERBS = {"plan": _plan, "ledger": _ledger, "card": _card}
