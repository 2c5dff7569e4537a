"""Evaluation of samples against the real data: metrics for eval.json and report.md, with real images as baseline."""

import dataclasses
import json
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from dito_jax.data import Source, drawn
from dito_jax.evaluation.metrics import ClassAgreement, frechet_distance, memorisation_ratio, utility


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Size of the final evaluation."""

    num_samples: int = 500
    """Number of samples to evaluate at the end of the run; 0: no evaluation."""
    max_reference: int = 5000
    """Maximum number of real images per split to compare with, chosen at random."""
    grid: int = 100
    """Number of samples shown in samples/final.png."""


def evaluate(
    images: Float[np.ndarray, "B h w c"],
    labels: Integer[np.ndarray, " B"],
    train: Source,
    validation: Source,
    *,
    max_reference: int,
) -> dict[str, Any]:
    """All metrics of metrics.py for the samples, each with the value that real images get.

    Fréchet distances depend on the set size, so all sets have the same size: the largest that the samples and both
    splits allow.
    """
    real, others = drawn(train, max_reference), drawn(validation, max_reference)
    train_images, validation_images = real["image"], others["image"]
    images = np.clip(images, train_images.min(), train_images.max())  # as saving to an image file does
    agreement = ClassAgreement(train_images, real["label"])
    size = min(len(images), len(train_images), len(validation_images))
    memorised = memorisation_ratio(images, train_images, validation_images)
    return {
        "num_samples": len(images),
        "class_agreement": agreement(images, labels),
        "class_agreement_of_validation": agreement(validation_images, others["label"]),
        "utility": utility(images, labels, validation_images, others["label"]),
        "utility_of_train": utility(train_images, real["label"], validation_images, others["label"]),
        "frechet_distance": frechet_distance(images[:size], validation_images[:size]),
        "frechet_distance_of_train": frechet_distance(train_images[:size], validation_images[:size]),
        "frechet_distance_set_size": size,
        "memorisation": dataclasses.asdict(memorised),
    }


def report(title: str, figures: dict[str, Any], settings: dict[str, Any]) -> str:
    """The text of report.md: metrics, images and sampling settings."""
    memorised = figures["memorisation"]
    rows = [
        (
            "class agreement",
            figures["class_agreement"],
            figures["class_agreement_of_validation"],
            "validation data",
        ),
        (
            "validation accuracy of a classifier trained on them (utility)",
            figures["utility"],
            figures["utility_of_train"],
            "training data",
        ),
        (
            f"Fréchet distance of pixels to validation data, {figures['frechet_distance_set_size']} images each",
            figures["frechet_distance"],
            figures["frechet_distance_of_train"],
            "training data",
        ),
        (
            "distance to nearest training image / to nearest validation image, median",
            memorised["median"],
            memorised["validation_median"],
            "validation data",
        ),
        (
            f"share of images with that ratio below {memorised['threshold']}",
            memorised["share_below"],
            memorised["validation_share_below"],
            "validation data",
        ),
    ]
    table = "\n".join(f"| {name} | {value:.4f} | {real:.4f} ({whose}) |" for name, value, real, whose in rows)
    return f"""# {title}

{figures["num_samples"]} samples. The last column is the value that real images get.

| | samples | real |
|---|---|---|
{table}

![samples](samples/final.png)

![loss](loss.png)
{_of_experts(figures)}
Drawn with `{json.dumps(settings)}`.
"""


def _of_experts(figures: dict[str, Any]) -> str:
    if "expert_load" not in figures:
        return ""
    load = figures["expert_load"]
    return f"""
Expert load on validation data: {load["smallest"]:.2f} to {load["largest"]:.2f} times the even share of rows.

![expert load](expert_load.png)
"""
