"""The end of a run: samples, the loss curve, the figures, and a report that shows them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from dito_jax.data import Source
from dito_jax.evaluation.evaluate import EvaluationConfig, evaluate, report
from dito_jax.evaluation.plots import image_grid, load_map, loss_curve
from dito_jax.evaluation.sample import SampleConfig, balanced_labels
from dito_jax.telemetry.metrics import read_metrics
from dito_jax.telemetry.run_directory import RunDirectory


NOT_RELEASED = "Computed on private data without noise: for those who may see the data, not to be released."


def final_evaluation(
    run: RunDirectory,
    draw: Callable[[nnx.State, Sequence[int], int], np.ndarray],
    params: nnx.State,
    train: Source,
    validation: Source | None,
    *,
    sample: SampleConfig,
    evaluation: EvaluationConfig,
    seed: int,
    load: Callable[[nnx.State, Source], np.ndarray] | None = None,
    private: bool = False,
) -> dict[str, Any] | None:
    """Writes samples/final.png and loss.png, and, where there are validation data, eval.json and report.md.

    `private`: training was; these figures look at the data themselves, so they are marked as not to be released.

    `load` measures how a network with experts uses them (expert_load.py); expert_load.png shows it.

    Returns the figures of eval.json, or None without an evaluation, or in a process that does not write.
    """
    labels = balanced_labels(max(evaluation.num_samples, evaluation.grid), train.num_classes)
    images = draw(params, labels, seed)
    shares = None if load is None or validation is None else load(params, validation)
    if not run.writes:  # all processes compute, one writes
        return None
    image_grid(visible(images[: evaluation.grid]), run.samples / "final.png")
    history = [row for row in read_metrics(run) if "loss" in row]
    loss_curve([row["step"] for row in history], [row["loss"] for row in history], run.path / "loss.png")
    if validation is None:
        return None
    if shares is not None:
        load_map(shares, run.path / "expert_load.png")
    figures = evaluate(images, np.array(labels), train, validation, max_reference=evaluation.max_reference)
    if shares is not None:
        figures["expert_load"] = {"smallest": float(shares.min()), "largest": float(shares.max())}
    said = report(run.path.name, figures, dataclasses.asdict(sample))
    if private:
        figures, said = figures | {"internal": NOT_RELEASED}, f"{said.rstrip()}\n\n{NOT_RELEASED}\n"
    run.write_json(run.evaluation.name, figures)
    run.write_text(run.report.name, said)
    return figures


def visible(images: np.ndarray) -> np.ndarray:
    """What a grid can show: grey or RGB as they are, of latents the first three channels, or the first."""
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., :3] if channels > 3 else images[..., :1]
