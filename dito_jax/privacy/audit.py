"""Empirical privacy audit of a run: membership inference, canaries, mechanism audit and memorisation.

    attacks       three membership inference attacks (attacks.py) on training and validation images; split check
    canaries      lower bounds on epsilon from the run's example canaries, if it has any (canaries.py)
    mechanism     lower bounds on the epsilon of its clipping and noise, and of planted bugs (mechanism_audit.py)
    memorisation  samples and their nearest training images

Guarantees
  - "refuted": with 95 % confidence the claimed epsilon is wrong, because a lower bound is above it.
  - "invalid": a planted bug was not detected, so the audit has no result.
  - Attacks and memorisation cannot refute a claim, because members were not chosen at random. They are computed from
    the data without noise and must not be released. The parts in FOR_THE_CARD use no data.
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
    """The three attacks for networks made by `build(params)`; `together`: model.pool, the images routed together."""
    of_loss = functools.partial(loss_score, key=jax.random.key(seed), loss_type=loss.loss_type)
    scores = {"loss": of_loss, "secmi": secmi_score, "pia": pia_score}
    return {
        name: make_scorer(
            build, functools.partial(score, prediction=loss.prediction), batch_size=BATCH, together=together
        )
        for name, score in scores.items()
    }


def attacked(scorers: dict[str, Scorer], params: Any, members: Batch, validation: Batch) -> Scores:
    """The scores of each attack for members and for validation images."""
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
    """The content of audit.json: all results and the verdict; `canaries` come with their scores by the loss attack."""
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
    """The text of audit.md."""
    claim = f"epsilon {found['claimed_epsilon']:.4g} at delta {found['delta']:g}"
    lines = [f"# Audit of {title}", "", f"Claimed: {claim}. Verdict: **{found['verdict']}**.", ""]
    lines += _of_canaries(found["canaries"]) + _of_mechanism(found["mechanism"])
    lines += _of_attacks(found["attacks"], found["split"]) + _of_memorisation(found["memorisation"])
    return "\n".join(lines) + "\n"


def _of_canaries(canaries: dict[str, Any] | None) -> list[str]:
    lines = ["## Canaries", ""]
    if canaries is None:
        return [
            *lines,
            "The run has no canaries: start a run with `--canaries 400` to get a lower bound on its epsilon.",
            "",
        ]
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
        return [*lines, "The run has no clipping and noise: it is not private.", ""]
    lines += ["| | claimed epsilon | lower bound | verdict | expected |", "|---|---|---|---|---|"]
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
        f"{one['members']} members, {one['validation']} validation images, {one['confidence']:.0%} intervals. "
        "Not to be released.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, of_one in attacks.items():
        figures = [of_one["auc"], of_one["accuracy"], *(of_one["tpr_at_fpr"][rate] for rate in rates)]
        lines.append(f"| {name} | {' | '.join(map(_estimate, figures))} |")
    biased = "Members can be told from validation images by pixels alone (biased split): the results above are invalid."
    fair = "A classifier on pixels alone cannot tell members from validation images"
    said = biased if split["biased"] else f"{fair} (AUC {_estimate(split['split_auc'])})."
    return [*lines, "", said, "", "![ROC](audit/roc.png)", ""]


def _of_memorisation(memorised: dict[str, Any]) -> list[str]:
    return [
        "## Memorisation",
        "",
        "Distance to the nearest training image / distance to the nearest validation image: median "
        f"{memorised['median']:.3f} of samples, {memorised['validation_median']:.3f} of validation images; below "
        f"{memorised['threshold']:g} for {memorised['share_below']:.1%} of samples, "
        f"{memorised['validation_share_below']:.1%} of validation images. The picture shows the closest samples (left) "
        "and their nearest training images (right). Not to be released.",
        "",
        "![samples and their nearest training images](audit/nearest.png)",
    ]


def _estimate(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return f"not resolved: {figure['reason']}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
