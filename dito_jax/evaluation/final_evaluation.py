"""Final evaluation of a run: samples, loss curve, metrics (eval.json) and report.md."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from dito_jax.data import Source
from dito_jax.evaluation.evaluate import EvaluationConfig, evaluate, report
from dito_jax.evaluation.pixels import reduced, visible
from dito_jax.evaluation.plots import image_grid, load_map, loss_curve
from dito_jax.evaluation.sample import SampleConfig, balanced_labels
from dito_jax.telemetry.metrics import read_metrics
from dito_jax.telemetry.progress import MakeMeter, ProgressMeter
from dito_jax.telemetry.run_directory import RunDirectory


NOT_RELEASED = "Computed on private data without noise: not to be released."


def final_evaluation(
    run: RunDirectory,
    draw: Callable[[nnx.State, Sequence[int], int], Iterator[np.ndarray]],
    params: nnx.State,
    train: Source,
    validation: Source | None,
    *,
    sample: SampleConfig,
    evaluation: EvaluationConfig,
    seed: int,
    load: Callable[[nnx.State, Source], np.ndarray] | None = None,
    private: bool = False,
    meter: MakeMeter = ProgressMeter,
) -> dict[str, Any] | None:
    """Writes samples/final.png and loss.png and, if there is validation data, eval.json and report.md.

    `private` marks the results as not to be released, because they are computed from the data without noise. `load`
    measures the expert load (expert_load.py), which is drawn in expert_load.png. `draw` is a `make_batch_sampler`. Its
    images are kept reduced (`pixels.reduced`), except those of the grid.

    Returns the content of eval.json; None without validation data, or in a process that does not write.
    """
    labels = balanced_labels(max(evaluation.num_samples, evaluation.grid), train.num_classes)
    shown, images = [], []
    with meter("sampling", len(labels)) as progress:
        for batch in draw(params, labels, seed):
            shown.extend(batch[: max(0, evaluation.grid - len(shown))].copy())  # not a view that keeps the batch
            images.append(reduced(batch))
            progress.add(len(batch))
    shares = None if load is None or validation is None else load(params, validation)
    if not run.writes:  # all processes compute, process 0 writes
        return None
    image_grid(visible(np.stack(shown)), run.samples / "final.png")
    history = [row for row in read_metrics(run) if isinstance(row.get("loss"), int | float)]
    loss_curve([row["step"] for row in history], [row["loss"] for row in history], run.path / "loss.png")
    if validation is None:
        return None
    if shares is not None:
        load_map(shares, run.path / "expert_load.png")
    figures = evaluate(
        np.concatenate(images), np.array(labels), train, validation, max_reference=evaluation.max_reference, meter=meter
    )
    if shares is not None:
        figures["expert_load"] = {"smallest": float(shares.min()), "largest": float(shares.max())}
    text = report(run.path.name, figures, dataclasses.asdict(sample))
    if private:
        figures, text = figures | {"internal": NOT_RELEASED}, f"{text.rstrip()}\n\n{NOT_RELEASED}\n"
    run.write_json(run.evaluation.name, figures)
    run.write_text(run.report.name, text)
    return figures
