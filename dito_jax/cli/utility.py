"""`dito privacy utility RUN [RUN ...]`: downstream utility of private samples, beside simpler uses of the same budget.

Utility is the accuracy, on validation data, of a classifier trained on the samples alone; class agreement and Fréchet
distance (`dito eval`) are in the table too. All runs must be on one data set; runs with the same epsilon and noise
multiplicity are averaged into one row.
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import numpy as np

from dito_jax.data import Batch, Source, arrays, drawn
from dito_jax.errors import UserError
from dito_jax.evaluation.evaluate import evaluate
from dito_jax.privacy.baseline import gaussian_samples
from dito_jax.run import saved_run


type Row = tuple[float, ...]

SEEDS = 5  # of the baseline
FIGURES = ("utility", "class_agreement", "frechet_distance")
HEAD = (
    "| images | epsilon | accuracy of a classifier trained on them | class agreement | Fréchet distance | of |\n"
    "|---|---|---|---|---|---|"
)


def compare(options: argparse.Namespace) -> str:
    """The table, in Markdown."""
    opened = [saved_run.opened(path) for path in (options.subject, *options.more)]
    first = opened[0][1]
    found: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for run, config in opened:
        if config.privacy.epsilon is None:
            raise UserError(f"{run.path} is not a private run (it has no privacy.epsilon); leave it out.")
        if config.data != first.data or config.privacy.delta != first.privacy.delta:
            raise UserError(
                f"{run.path} has another data set or privacy.delta than {options.subject}: give runs that share both."
            )
        if not run.evaluation.exists():
            raise UserError(f"{run.path}: no {run.evaluation.name} yet; `dito eval {run.path}` writes it.")
        figures: dict[str, Any] = json.loads(run.evaluation.read_text())
        if missing := [name for name in FIGURES if name not in figures]:
            raise UserError(
                f"{run.evaluation}: no {missing[0]} in it, it is old: `dito eval {run.path}` writes it again."
            )
        if (config.init_from, config.train.trainable) != (first.init_from, first.train.trainable):
            raise UserError(
                f"{run.path} has another init_from or train.trainable than {options.subject}; leave it out."
            )
        found[config.privacy.noise_multiplicity, config.privacy.epsilon].append(
            tuple(figures[name] for name in FIGURES)
        )
    lines = [HEAD]
    for (multiplicity, epsilon), of_runs in sorted(found.items()):
        lines.append(_line(f"samples of DP-SGD, noise multiplicity {multiplicity}", f"{epsilon:g}", of_runs, "runs"))
    train, validation = (first.data.open(split) for split in ("train", "validation"))
    judged = lambda images, labels: _judged(images, labels, train, validation)
    for epsilon in sorted({epsilon for _, epsilon in found}):
        of_seeds = [judged(*_gaussians(train, epsilon, first.privacy.delta, seed)) for seed in range(SEEDS)]
        lines.append(_line("samples of noised Gaussians, one a class", f"{epsilon:g}", of_seeds, "draws"))
    if first.init_from is not None:
        public = drawn(saved_run.opened(first.init_from)[1].data.open("train"), len(train))
        lines.append(_line("the public images that the runs begin with", "0", [judged(*_pair(public))], "sets"))
    lines.append(_line("the training images, without privacy", "-", [judged(*_pair(drawn(train, len(train))))], "sets"))
    return "\n".join([*lines, "", f"delta {first.privacy.delta:g}. Each row's epsilon is a budget of its own."])


def _judged(images: np.ndarray, labels: np.ndarray, train: Source, validation: Source) -> Row:
    """FIGURES, as `dito eval` has them of a run's samples."""
    figures = evaluate(images, labels, train, validation, max_reference=len(train))
    return tuple(figures[name] for name in FIGURES)


def _gaussians(train: Source, epsilon: float, delta: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return gaussian_samples(
        *_pair(arrays(train)), train.num_classes, epsilon=epsilon, delta=delta, num=len(train), seed=seed
    )


def _pair(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return batch["image"], batch["label"]


def _line(name: str, epsilon: str, rows: list[Row], what: str) -> str:
    columns = [
        f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(rows) > 1 else "")
        for values in zip(*rows, strict=True)
    ]
    count = f"{len(rows)} {what if len(rows) > 1 else what[:-1]}"
    return f"| {name} | {epsilon} | {' | '.join(columns)} | {count} |"
