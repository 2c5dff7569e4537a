"""`dito sample RUN`: samples of a checkpoint, as a PNG grid and an .npz."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dito_jax.errors import UserError
from dito_jax.evaluation.final_evaluation import visible
from dito_jax.evaluation.plots import image_grid
from dito_jax.evaluation.sample import balanced_labels
from dito_jax.run.loaded_run import Run, load_run


def main(options: argparse.Namespace) -> None:
    """Draws the samples and writes both files; earlier ones are never overwritten."""
    if options.num < 1:
        raise UserError(f"--num {options.num}: wanted at least 1.")
    run = load_run(options.run, step=options.step, ema_decay=options.ema_decay)
    classes = [run.label(name) for name in options.classes or range(run.config.model.num_classes)]
    labels = [classes[i] for i in balanced_labels(options.num, len(classes))]
    images = run.sample(
        labels, guidance=options.guidance, steps=options.steps, sampler=options.sampler, seed=options.seed
    )
    path = unused(_path(options, run))
    image_grid(visible(images), path)
    np.savez(path.with_suffix(".npz"), images=images, labels=np.array(labels, np.int32))
    print(f"{path}, {path.with_suffix('.npz')}")


def unused(path: Path) -> Path:
    """`path`, or the first of path_2, path_3, ... for which there is neither a PNG nor an .npz."""
    stem, number = path.stem, 1
    while path.exists() or path.with_suffix(".npz").exists():
        number += 1
        path = path.with_stem(f"{stem}_{number}")
    return path


def _path(options: argparse.Namespace, run: Run) -> Path:
    """Where to write: --out FILE.png, or a name that says what was asked for."""
    out = Path(options.out) if options.out else run.path / "samples"
    if out.suffix == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        return out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory, or a name that ends in .png.")
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{_name(options, run.step)}.png"


def _name(options: argparse.Namespace, step: int) -> str:
    asked = {
        "guidance": options.guidance, "steps": options.steps, "sampler": options.sampler, "ema": options.ema_decay,
        "class": _joined(options.classes),
    }  # fmt: skip
    return "_".join(
        [f"step_{step}_seed_{options.seed}", *(f"{name}_{value}" for name, value in asked.items() if value is not None)]
    )


def _joined(classes: Sequence[str] | None) -> str | None:
    """Names of classes as part of a file name, without what such a name cannot have."""
    if not classes:
        return None
    words = ["".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name) for name in classes]
    return "-".join(words)[:60]
