"""The audit of a run: what an adversary with its weights finds out, beside what was promised.

    attacks       of three kinds (attacks.py) on training images and hold-outs, and whether the split betrays members
    canaries      lower bounds on epsilon from the run's own example canaries, where it has some (canaries.py)
    mechanism     lower bounds on the epsilon of its clipping and noise, and of planted bugs (mechanism_audit.py)
    memorisation  samples beside their nearest training images

Guarantees
  - "refuted" means: with 95 % confidence the run is not what it claims, for one of its bounds is above the claim.
  - "invalid" means: a planted bug went unnoticed, so that nothing follows.
  - Attacks and memorisation refute nothing: members were not chosen by coins. They are computed on the data without
    noise, and are not to be released. FOR_THE_CARD are those parts that look at no data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dito_jax.data import Batch
from dito_jax.diffusion.loss import LossConfig
from dito_jax.evaluation.metrics import memorisation_ratio
from dito_jax.privacy.attack_report import attack_report, split_check
from dito_jax.privacy.attacks import loss_score, make_scorer, pia_score, secmi_score
from dito_jax.privacy.canaries import BOUNDS, Canaries, epsilon_bounds, verdict
from dito_jax.privacy.mechanism_audit import Check


FOR_THE_CARD = ("verdict", "claimed_epsilon", "delta", "step", "canaries", "mechanism")
BATCH = 100
Scorer = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
Scores = dict[str, tuple[Float[np.ndarray, " members"], Float[np.ndarray, " validation"]]]


def make_scorers(build: Callable[[Any], Any], loss: LossConfig, *, seed: int, together: int) -> dict[str, Scorer]:
    """The three attacks on networks that `build(params)` makes; `together`: images that one computes together."""
    of_loss = functools.partial(loss_score, key=jax.random.key(seed), loss_type=loss.loss_type)
    scores = {"loss": of_loss, "secmi": secmi_score, "pia": pia_score}
    return {
        name: make_scorer(
            build, functools.partial(score, prediction=loss.prediction), batch_size=BATCH, together=together
        )
        for name, score in scores.items()
    }


def attacked(scorers: dict[str, Scorer], params: Any, members: Batch, validation: Batch) -> Scores:
    """Each attack's scores of members and of hold-outs."""
    of = lambda scorer, batch: scorer(params, batch["image"], batch["label"])
    return {name: (of(scorer, members), of(scorer, validation)) for name, scorer in scorers.items()}


def findings(
    scores: Scores,
    members: Batch,
    validation: Batch,
    samples: Float[np.ndarray, "samples h w c"],
    *,
    canaries: tuple[Canaries, Float[np.ndarray, " num"]] | None,
    mechanism: dict[str, Check],
    claimed_epsilon: float,
    delta: float,
) -> dict[str, Any]:
    """audit.json: every figure, and the verdict. `canaries`: with the scores that the loss gives them."""
    found: dict[str, Any] = {
        "claimed_epsilon": claimed_epsilon,
        "delta": delta,
        "attacks": {name: dataclasses.asdict(attack_report(*pair)) for name, pair in scores.items()},
        "split": dataclasses.asdict(split_check(members["image"], validation["image"])),
        "canaries": None,
        "mechanism": {name: dataclasses.asdict(check) | {"passed": check.passed} for name, check in mechanism.items()},
        "memorisation": dataclasses.asdict(memorisation_ratio(samples, members["image"], validation["image"])),
    }
    refuted = any(not check.passed and check.wanted == "not refuted" for check in mechanism.values())
    blind = any(not check.passed and check.wanted == "refuted" for check in mechanism.values())
    if canaries is not None:
        planted, of_loss = canaries
        bounds = epsilon_bounds(of_loss, planted.included, delta=delta)
        found["canaries"] = dataclasses.asdict(bounds) | {"verdict": verdict(bounds, claimed_epsilon)}
        refuted |= verdict(bounds, claimed_epsilon) == "refuted"
    return {"verdict": "refuted" if refuted else "invalid" if blind else "not refuted"} | found


def report(title: str, found: dict[str, Any]) -> str:
    """audit.md."""
    claim = f"epsilon {found['claimed_epsilon']:.4g} at delta {found['delta']:g}"
    lines = [f"# Audit of {title}", "", f"Claimed: {claim}. Verdict: **{found['verdict']}**.", ""]
    lines += _of_canaries(found["canaries"]) + _of_mechanism(found["mechanism"])
    lines += _of_attacks(found["attacks"], found["split"]) + _of_memorisation(found["memorisation"])
    return "\n".join(lines) + "\n"


def _of_canaries(canaries: dict[str, Any] | None) -> list[str]:
    lines = ["## Canaries", ""]
    if canaries is None:
        return [*lines, "The run has none: start one with `--canaries 400`, and its epsilon is bounded from below.", ""]
    bounds = ", ".join(f"{name} {canaries[name]:.3f}" for name in BOUNDS)
    return [
        *lines,
        f"{canaries['num_in']} in, {canaries['num_out']} out; AUC of the loss {canaries['auc']:.3f}. With "
        f"{canaries['confidence']:.0%} confidence epsilon is at least: {bounds}. {canaries['verdict'].capitalize()}.",
        "",
    ]


def _of_mechanism(mechanism: dict[str, Any]) -> list[str]:
    lines = ["## Clipping and noise", ""]
    if not mechanism:
        return [*lines, "The run has none: it is not private.", ""]
    lines += ["| | epsilon claimed | at least | verdict | wanted |", "|---|---|---|---|---|"]
    for name, check in mechanism.items():
        least = max(check["bounds"][bound] for bound in BOUNDS)
        lines.append(
            f"| {name} | {check['claimed_epsilon']:.3f} | {least:.3f} | {check['verdict']} | {check['wanted']} |"
        )
    return [*lines, ""]


def _of_attacks(attacks: dict[str, Any], split: dict[str, Any]) -> list[str]:
    one = next(iter(attacks.values()))
    rates = list(one["tpr_at_fpr"])
    head = ["attack", "AUC", "accuracy", *(f"TPR at FPR {float(rate):.1%}" for rate in rates)]
    lines = [
        "## Attacks",
        "",
        f"{one['members']} members, {one['validation']} hold-outs, {one['confidence']:.0%} intervals. "
        "Not to be released.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, of_one in attacks.items():
        figures = [of_one["auc"], of_one["accuracy"], *(of_one["tpr_at_fpr"][rate] for rate in rates)]
        lines.append(f"| {name} | {' | '.join(map(_estimate, figures))} |")
    biased = "The split betrays its members by their pixels alone: the figures above mean nothing."
    fair = "Nothing in the pixels alone tells members from hold-outs"
    said = biased if split["biased"] else f"{fair} (AUC {_estimate(split['split_auc'])})."
    return [*lines, "", said, "", "![ROC](audit/roc.png)", ""]


def _of_memorisation(memorised: dict[str, Any]) -> list[str]:
    return [
        "## Memorisation",
        "",
        "Distance to the nearest training image over that to the nearest hold-out: median "
        f"{memorised['median']:.3f} of samples, {memorised['validation_median']:.3f} of hold-outs; below "
        f"{memorised['threshold']:g} for {memorised['share_below']:.1%} of samples, "
        f"{memorised['validation_share_below']:.1%} of hold-outs. Samples that are nearest, left, beside what they are "
        "near to. Not to be released.",
        "",
        "![samples beside training images](audit/nearest.png)",
    ]


def _estimate(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return f"not resolved: {figure['reason']}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
