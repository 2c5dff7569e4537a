"""The privacy card of a run: its DP statement, the accounting behind it, and what it does not cover.

Guarantees
  - Every value is read from the ledger or the run's own files, or computed from them.
  - epsilon is that of all charged steps, including steps repeated after a crash and charged steps that were not taken,
    plus those of the private runs on the same data set that the run was warm-started from.
  - There is no card if the ledger lacks an entry that the run has recorded, or has entries that differ from the plan of
    the run: a ledger that was rewritten, truncated or exchanged (ledger_head.py).
  - A card says "not audited" without RUN/audit.json.
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
from dito_jax.privacy.ledger_head import check_ledger
from dito_jax.privacy.run import PLAN, release_of
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.telemetry.metrics import read_metrics
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.trainable import Names


RELEASED = (
    "the parameters and EMA parameters of all checkpoints",
    "the learning rate and the norm of the noised gradient of each step, in metrics.jsonl and tensorboard/",
    "samples/: drawn from these parameters and a public seed",
)
VALIDATION_LOSS = (
    "validation_loss, in metrics.jsonl and tensorboard/: computed from these parameters on the validation split, which "
    "is not part of the private data set; examples of that split have no privacy guarantee"
)
NOT_RELEASED = (
    "eval.json, report.md, comparisons of samples with real images: computed on the data without noise",
    "metrics named internal_* in metrics.jsonl and tensorboard/, if privacy.internal was set",
    "step times, in metrics.jsonl, tensorboard/, goodput.jsonl and events.jsonl: they depend on the sizes of batches",
    "the secret from which keys are derived, the times in the ledger, and the sizes of batches",
)
LIMITS = (
    "The accounting assumes settings that were fixed beforehand: settings of a later run that were chosen from the "
    "results of an earlier run are not covered by the proof.",
    "Other runs of a hyperparameter search are not in this run's epsilon; they are in the epsilon of the data set.",
    "The sampling probability contains the number of units, which is assumed to be public.",
    "Noise is float32, from ChaCha20; attacks on the last bits of a float32 sum (arXiv 2112.05307) are not covered.",
    "Statistics of the data that were computed before (normalization, the encoder of latents, deduplication) are not "
    "covered.",
    "After a warm start, the privacy of other data sets that the earlier run used is stated by its own card, if any.",
    "Duplicates of an example, and all examples of a person unless the unit is a user, have weaker protection.",
)


def card(
    run: RunDirectory, privacy: PrivacyConfig, *, init_from: str | None, trainable: Names, canaries: int
) -> dict[str, Any]:
    """The privacy card of a run as a dict for JSON; the arguments are fields of the run's config.

    Raises:
      UserError: the run is not private, its ledger is missing, or the ledger is not the one that was charged.
    """
    if privacy.epsilon is None or privacy.dataset is None or not (run.path / PLAN).exists():
        raise UserError(f"{run.path}: not a private run (no {PLAN}), so there is no privacy card.")
    path = ledger_path(privacy.dataset)
    if not path.exists():
        raise UserError(f"{path}: the ledger of this run is missing; copy it here, or set DITO_LEDGERS.")
    kept, ledger = json.loads((run.path / PLAN).read_text()), Ledger(path)
    plan, audit = kept["plan"], run.path / "audit.json"
    check_ledger(ledger, run, kept, release_of(StepPlan(**plan)))
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
        "sampler": f"Poisson subsampling of units, jax-privacy {version('jax-privacy')}",
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
        "released": _released(run),
        "not_released": NOT_RELEASED,
        "limits": LIMITS,
        "audit": {name: json.loads(audit.read_text())[name] for name in FOR_THE_CARD} if audit.exists() else None,
    }


def _released(run: RunDirectory) -> tuple[str, ...]:
    validated = any("validation_loss" in row for row in read_metrics(run))
    return (*RELEASED, VALIDATION_LOSS) if validated else RELEASED


def _spent(ledger: Ledger, kept: dict[str, Any], privacy: PrivacyConfig) -> dict[str, Any]:
    """The epsilon of the run's parameters, of its own steps, and of the data set."""
    own, behind = ledger.spent(kept["run"]), kept.get("starts_from", [])  # absent in runs of older versions
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
            f"{run.path}: {charged} of its steps are charged in {path}, but it has a checkpoint of step "
            f"{max(steps, default=0)}: no privacy statement is possible."
        )


def markdown(facts: dict[str, Any]) -> str:
    """The card as Markdown."""
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
