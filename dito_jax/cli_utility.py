"""`dito privacy utility RUN [RUN ...]`: what private samples are worth beside what simpler ways make of the budget.

Worth is the held-out accuracy of a classifier trained on them alone. All runs must be on one data set; those with the
same epsilon and draws are one row, their mean.
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import numpy as np

from dito_jax import command_line
from dito_jax.data import Source, arrays, drawn
from dito_jax.errors import UserError
from dito_jax.evaluation.metrics import utility
from dito_jax.privacy.baseline import gaussian_samples


SEEDS = 5  # of the baseline


def compare(options: argparse.Namespace) -> str:
    """The table, in Markdown."""
    opened = [command_line.opened(path) for path in (options.subject, *options.more)]
    first = opened[0][1]
    found: dict[tuple[int, float], list[float]] = defaultdict(list)
    for run, config in opened:
        if config.privacy.epsilon is None or config.data != first.data or config.privacy.delta != first.privacy.delta:
            raise UserError(f"{run.path}: wanted private runs on one data set, with one delta; leave it out.")
        if not run.evaluation.exists():
            raise UserError(f"{run.path}: no {run.evaluation.name} yet; `dito eval {run.path}` makes it.")
        figures: dict[str, Any] = json.loads(run.evaluation.read_text())
        found[config.privacy.draws, config.privacy.epsilon].append(figures["utility"])
    heldout, epsilons = arrays(first.data.open("heldout")), sorted({epsilon for _, epsilon in found})
    worth = lambda images, labels: utility(images, labels, heldout["image"], heldout["label"])
    lines = ["| classifier trained on | epsilon | accuracy on held-out images | of |", "|---|---|---|---|"]
    for (draws, epsilon), of_runs in sorted(found.items()):
        lines.append(_row(f"samples of DP-SGD, {draws} draws", f"{epsilon:g}", of_runs, "runs"))
    train = first.data.open("train")
    for epsilon in epsilons:
        of_seeds = [worth(*_gaussians(train, epsilon, first.privacy.delta, seed)) for seed in range(SEEDS)]
        lines.append(_row("samples of noised Gaussians, one a class", f"{epsilon:g}", of_seeds, "draws"))
    if first.start_from is not None:
        public = drawn(command_line.opened(first.start_from)[1].data.open("train"), len(train))
        lines.append(_row("the public images that the runs begin with", "0", [worth(**_named(public))], "sets"))
    lines.append(_row("the training images, without privacy", "-", [worth(**_named(arrays(train)))], "sets"))
    return "\n".join([*lines, "", f"delta {first.privacy.delta:g}. Each row's epsilon is a budget of its own."])


def _gaussians(train: Source, epsilon: float, delta: float, seed: int):
    data = arrays(train)
    return gaussian_samples(
        data["image"], data["label"], train.num_classes, epsilon=epsilon, delta=delta, num=len(train), seed=seed
    )


def _named(batch) -> dict[str, np.ndarray]:
    return {"images": batch["image"], "labels": batch["label"]}


def _row(name: str, epsilon: str, values: list[float], what: str) -> str:
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    count = f"{len(values)} {what if len(values) > 1 else what[:-1]}"
    return f"| {name} | {epsilon} | {np.mean(values):.3f}{spread} | {count} |"
