"""`dito sample RUN`: samples of a checkpoint, as a PNG grid and an .npz."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dito_jax.data import LatentsData
from dito_jax.errors import UserError
from dito_jax.evaluation.pixels import as_pixels, as_rgb, visible
from dito_jax.evaluation.plots import image_grid
from dito_jax.evaluation.sample import balanced_labels
from dito_jax.evaluation.sample_archive import npz_of_samples
from dito_jax.run.loaded_run import Run, load_run
from dito_jax.telemetry.progress import ProgressMeter


SHOWN = 100  # most images in the PNG grid
SUFFIXES = (".png", ".npz")


def main(options: argparse.Namespace) -> None:
    """Draws the samples and writes both files; earlier ones are never overwritten. Memory is that of one batch."""
    if options.num < 1:
        raise UserError(f"--num {options.num}: wanted at least 1.")
    run = load_run(options.run, step=options.step, ema_decay=options.ema_decay, ema=not options.no_ema)
    latents = isinstance(run.config.data, LatentsData)
    if options.npz and (latents or run.config.model.image_shape[2] not in (1, 3)):
        raise UserError(
            f"--npz: the model's samples have {run.config.model.image_shape[2]} channels and are no pixels; leave out "
            "--npz, decode the latents, and write the pixels as uint8 `arr_0`."
        )
    classes = [run.label(name) for name in options.classes or range(run.config.model.num_classes)]
    labels = [classes[i] for i in balanced_labels(options.num, len(classes))]
    path = unused(_path(options, run))
    write(options, run, labels, path)
    print(f"{path.with_suffix('.png')}, {path.with_suffix('.npz')}")
    if isinstance(run.config.data, LatentsData):
        print(f"latents divided by data.scaling_factor {run.config.data.scaling_factor:g}, ready for the decoder")


def write(options: argparse.Namespace, run: Run, labels: Sequence[int], path: Path) -> None:
    """Draws the samples of `labels` and writes them to `path`, with the suffixes .npz and .png."""
    height, width, channels = run.config.model.image_shape
    data = run.config.data
    latents = isinstance(data, LatentsData)
    own = (("latents" if latents else "images", "labels"), (height, width, channels), np.dtype(np.float32))
    names, shape, dtype = (("arr_0", "arr_1"), (height, width, 3), np.dtype(np.uint8)) if options.npz else own
    shown: list[np.ndarray] = []
    batches = run.sample_batches(
        labels, guidance=options.guidance, steps=options.steps, sampler=options.sampler, seed=options.seed
    )
    with (
        ProgressMeter("sampling", len(labels)) as meter,
        npz_of_samples(path.with_suffix(".npz"), names, shape, dtype, labels) as file,
    ):
        for images in batches:
            file.append(as_rgb(as_pixels(images)) if options.npz else images)
            shown.extend(images[: max(0, SHOWN - len(shown))].copy())  # not a view that keeps the batch
            meter.add(len(images))
    scale = data.scaling_factor if isinstance(data, LatentsData) else 1.0  # latents near [-1, 1] are seen best
    image_grid(visible(scale * np.stack(shown)), path.with_suffix(".png"))


def unused(path: Path) -> Path:
    """`path`, or the first of path_2, path_3, ... for which there is neither a PNG nor an .npz."""
    stem, number = path.stem, 1
    while any(path.with_suffix(suffix).exists() for suffix in SUFFIXES):
        number += 1
        path = path.with_stem(f"{stem}_{number}")
    return path


def _path(options: argparse.Namespace, run: Run) -> Path:
    """Where to write: --out FILE, or a name that says what was asked for."""
    out = Path(options.out) if options.out else run.path / "samples"
    if out.suffix in SUFFIXES:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory, or a name that ends in .png or .npz.")
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{_name(options, run.step)}.png"


def _name(options: argparse.Namespace, step: int) -> str:
    asked = {
        "guidance": options.guidance, "steps": options.steps, "sampler": options.sampler, "ema": options.ema_decay,
        "class": _joined(options.classes),
    }  # fmt: skip
    words = [f"{name}_{value}" for name, value in asked.items() if value is not None]
    return "_".join([f"step_{step}_seed_{options.seed}", *(["no_ema"] if options.no_ema else []), *words])


def _joined(classes: Sequence[str] | None) -> str | None:
    """Names of classes as part of a file name, without what such a name cannot have."""
    if not classes:
        return None
    words = ["".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name) for name in classes]
    return "-".join(words)[:60]
