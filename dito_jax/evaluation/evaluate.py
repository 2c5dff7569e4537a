"""Evaluation of samples against the real data: metrics for eval.json and report.md, with real images as baseline."""

import dataclasses
import json
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from dito_jax.data import Batch, Source
from dito_jax.evaluation.metrics import ClassAgreement, frechet_distance, memorisation_ratio, utility
from dito_jax.evaluation.pixels import reduced
from dito_jax.telemetry.progress import MakeMeter, ProgressMeter


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
    meter: MakeMeter = ProgressMeter,
) -> dict[str, Any]:
    """All metrics of metrics.py for the samples, each with the value that real images get.

    Images larger than 32 x 32 are reduced to that (`pixels.reduced`), one at a time as they are read, so memory is
    bounded by the number of images, whatever their size. `images` may be reduced already.

    Fréchet distances depend on the set size, so all sets have the same size: the largest that the samples and both
    splits allow.
    """
    real, others = (read_reduced(split, max_reference, meter) for split in (train, validation))
    train_images, validation_images = real["image"], others["image"]
    images = np.clip(reduced(images), train_images.min(), train_images.max())  # as saving to an image file does
    size = min(len(images), len(train_images), len(validation_images))
    stages = {
        "class_agreement": lambda: agreement(images, labels),
        "class_agreement_of_validation": lambda: agreement(validation_images, others["label"]),
        "utility": lambda: utility(images, labels, validation_images, others["label"]),
        "utility_of_train": lambda: utility(train_images, real["label"], validation_images, others["label"]),
        "frechet_distance": lambda: frechet_distance(images[:size], validation_images[:size]),
        "frechet_distance_of_train": lambda: frechet_distance(train_images[:size], validation_images[:size]),
        "frechet_distance_set_size": lambda: size,
        "memorisation": lambda: dataclasses.asdict(memorisation_ratio(images, train_images, validation_images)),
    }
    figures: dict[str, Any] = {"num_samples": len(images), "image_shape_compared": list(images.shape[1:])}
    with meter("evaluating", len(stages) + 1, unit="metrics") as progress:
        agreement = ClassAgreement(train_images, real["label"])
        progress.add(1)
        for name, computed in stages.items():
            figures[name] = computed()
            progress.add(1)
    return figures


def read_reduced(source: Source, most: int, meter: MakeMeter = ProgressMeter) -> Batch:
    """At most `most` examples, those of `data.drawn`, with reduced images (`pixels.reduced`)."""
    order = np.random.default_rng(0).permutation(len(source))[:most]
    images, labels = [], []
    with meter("reading real images", len(order)) as progress:
        for index in order:
            example = source[int(index)]
            images.append(reduced(example["image"][None])[0])
            labels.append(example["label"])
            progress.add(1)
    return Batch(image=np.stack(images), label=np.stack(labels))


def report(title: str, figures: dict[str, Any], settings: dict[str, Any]) -> str:
    """The text of report.md: metrics, images and sampling settings."""
    return f"""# {title}

{figures["num_samples"]} samples. The last column is the value that real images get.

| | samples | real |
|---|---|---|
{_table(figures)}

![samples](samples/final.png)

![loss](loss.png)
{_of_experts(figures)}
Drawn with `{json.dumps(settings)}`.
"""


def _table(figures: dict[str, Any]) -> str:
    """The rows of the table in report.md."""
    memorised = figures["memorisation"]
    height, width, _ = figures["image_shape_compared"]
    size = figures["frechet_distance_set_size"]
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
            f"Fréchet distance of {height} x {width} pixels to validation data, {size} images each",
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
    return "\n".join(f"| {name} | {value:.4f} | {real:.4f} ({whose}) |" for name, value, real, whose in rows)


def _of_experts(figures: dict[str, Any]) -> str:
    if "expert_load" not in figures:
        return ""
    load = figures["expert_load"]
    return f"""
Expert load on validation data: {load["smallest"]:.2f} to {load["largest"]:.2f} times the even share of rows.

![expert load](expert_load.png)
"""
