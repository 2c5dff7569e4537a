"""A private run's card: what was promised of it, by which arithmetic, and what the promise does not cover.

Guarantees
  - Every figure is read from the ledger, from the run's own files, or computed of them; none is typed.
  - epsilon is that of the steps that were charged: those that a crash made the run take again count, and those that
    it paid for and did not take; and those of the private runs that it starts from, on the same data set.
  - A card says "not audited" until RUN/audit.json is there.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import adjacency, epsilon, merged
from dito_jax.privacy.audit import FOR_THE_CARD
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.run import PLAN
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.trainable import Names


RELEASED = (
    "the parameters of all checkpoints and their averages",
    "the learning rate and the noised gradient's norm of each step, in metrics.jsonl and tensorboard/",
)
NOT_RELEASED = (
    "eval.json, report.md, samples/ beside real images: computed on the data without noise",
    "metrics named internal_*, in the same files, if privacy.internal was set",
    "how long steps took, in the same files, goodput.jsonl and events.jsonl: reading what was drawn takes time",
    "the secret that keys are made of, the ledger's times, and the lengths of batches",
)
LIMITS = (
    "Losses of all steps are added up as of a list that was fixed beforehand: settings of a later run that were chosen "
    "by what an earlier one released are not covered by the proof.",
    "Other runs of a search over settings are not in this run's epsilon; they are in the data set's.",
    "The number of units is in the sampling probability: it is taken to be public.",
    "Noise is float32, of ChaCha20; attacks on the last bits of a float32 sum (arXiv 2112.05307) are not covered.",
    "Statistics of the data that were made before (normalisation, latents' encoder, removal of duplicates) are not "
    "covered.",
    "Of a run that starts from another, what that saw of other data sets is covered by its own card, if it has one.",
    "Duplicates of an example, and all examples of a person unless the unit is a user, are protected by less.",
)


def card(
    run: RunDirectory, privacy: PrivacyConfig, *, init_from: str | None, trainable: Names, canaries: int
) -> dict[str, Any]:
    """What there is to say of a private run, ready for JSON: of its privacy, and of the fields of its config so named.

    Raises:
      UserError: the run is not private, its data set has no ledger here, or that lacks steps that the run took.
    """
    if privacy.epsilon is None or privacy.dataset is None or not (run.path / PLAN).exists():
        raise UserError(f"{run.path}: not a private run (no {PLAN}): there is nothing to promise.")
    path = ledger_path(privacy.dataset)
    if not path.exists():
        raise UserError(f"{path}: the ledger that this run was charged to is not here; copy it, or set DITO_LEDGERS.")
    kept, ledger = json.loads((run.path / PLAN).read_text()), Ledger(path)
    plan, audit = kept["plan"], run.path / "audit.json"
    _check_charges(run, sum(ledger.spent(kept["run"]).values()), path)
    assert ledger.budget is not None
    return {
        "run": kept["run"],
        "dataset": privacy.dataset,
        "unit": ledger.budget.unit,
        "images_per_user": privacy.images_per_user,
        **_spent(ledger, kept, privacy),
        "budget_of_dataset": ledger.budget.epsilon,
        "runs_on_dataset": len(ledger.runs()),
        "accountant": f"privacy loss distributions, dp-accounting {version('dp-accounting')}",
        "sampler": f"Poisson, a coin for every unit and step, jax-privacy {version('jax-privacy')}",
        "sampling_prob": plan["sampling_prob"],
        "max_batch": plan["max_batch"],
        "noise_multiplier": plan["noise_multiplier"],
        "clip_norm": privacy.clip_norm,
        "starts": ledger.restarts(kept["run"]),
        "noise_multiplicity": privacy.noise_multiplicity,
        "init_from": init_from,
        "trainable": trainable or "all",
        "canaries": canaries,
        "backend": privacy.backend,
        "ledger": {"entries": ledger.number, "head": ledger.head},
        "released": RELEASED,
        "not_released": NOT_RELEASED,
        "limits": LIMITS,
        "audit": {name: json.loads(audit.read_text())[name] for name in FOR_THE_CARD} if audit.exists() else None,
    }


def _spent(ledger: Ledger, kept: dict[str, Any], privacy: PrivacyConfig) -> dict[str, Any]:
    """What the run's parameters depend on cost, and what else was charged."""
    own, behind = ledger.spent(kept["run"]), kept.get("starts_from", [])  # older runs have not kept them
    whole = merged(own, *(ledger.spent(name) for name in behind))
    return {
        "adjacency": adjacency(whole),
        "epsilon": epsilon(whole, privacy.delta),
        "delta": privacy.delta,
        "epsilon_asked": privacy.epsilon,
        "epsilon_of_these_steps_alone": epsilon(own, privacy.delta),
        "steps_charged": sum(own.values()),
        "private_runs_behind_it": kept.get("starts_from", "not recorded: an older run"),
        "epsilon_of_dataset": epsilon(ledger.spent(), privacy.delta),
    }


def _check_charges(run: RunDirectory, charged: int, path: Path) -> None:
    steps = [int(found[0]) for kept in run.checkpoints.glob("*") if (found := re.match(r"\d+", kept.name))]
    if charged < max(steps, default=0) or not charged:
        raise UserError(
            f"{run.path}: {charged} of its steps are entered in {path}, and it has a checkpoint of step "
            f"{max(steps, default=0)}: there is nothing to promise."
        )


def markdown(facts: dict[str, Any]) -> str:
    """The same for people."""
    lists = ("released", "not_released", "limits", "audit", "ledger")
    row = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    lines = [
        f"# Privacy card of run {facts['run'][:8]}",
        "",
        f"({facts['epsilon']:.4g}, {facts['delta']:g})-differentially private for one {facts['unit']} "
        f"({facts['adjacency']} neighbours).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {row(value)} |" for name, value in facts.items() if name not in lists),
        f"| ledger | {facts['ledger']['entries']} entries, head {facts['ledger']['head'][:16]} |",
    ]
    for name in ("released", "not_released", "limits"):
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", *(f"- {entry}" for entry in facts[name])]
    lines += ["", "## Audit", ""]
    lines += ["Not audited."] if facts["audit"] is None else ["```", json.dumps(facts["audit"], indent=2), "```"]
    return "\n".join(lines) + "\n"
