"""Plots as PNG files: sample grid, loss curve, expert load, ROC curves; written atomically."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_curve

from dito_jax.evaluation.pixels import as_pixels
from dito_jax.telemetry.run_directory import atomic_path


SIDE = 64  # approximate side in pixels to which small images are enlarged
GAP = 2  # pixels between images


def grid_pixels(
    images: Float[np.ndarray, "B h w c"], *, columns: int | None = None
) -> UInt8[np.ndarray, "height width c"]:
    """A grid of images in [-1, 1], grey or RGB, with `columns` columns (default: a square grid) on white.

    Small images are enlarged by an integer factor without interpolation.

    Raises:
      ValueError: the images are neither grey nor RGB.
    """
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images with {channels} channels cannot be drawn; decode them to 1 (grey) or 3 (RGB).")
    zoom = max(1, SIDE // max(height, width))
    pixels = as_pixels(images).repeat(zoom, axis=1).repeat(zoom, axis=2)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    down, across = height * zoom + GAP, width * zoom + GAP
    canvas = np.full((rows * down + GAP, columns * across + GAP, channels), 255, np.uint8)
    for number, image in enumerate(pixels):
        row, column = divmod(number, columns)
        top, left = GAP + row * down, GAP + column * across
        canvas[top : top + height * zoom, left : left + width * zoom] = image
    return canvas


def image_grid(images: Float[np.ndarray, "B h w c"], path: str | os.PathLike, *, columns: int | None = None) -> None:
    """Writes `grid_pixels` of the images as a PNG file."""
    save_png(grid_pixels(images, columns=columns), path)


def save_png(canvas: UInt8[np.ndarray, "height width c"], path: str | os.PathLike) -> None:
    """Writes an image, grey or RGB, as a PNG file."""
    with atomic_path(path) as partial:
        Image.fromarray(canvas[:, :, 0] if canvas.shape[-1] == 1 else canvas).save(partial, "PNG")


def loss_curve(steps: Sequence[int], losses: Sequence[float], path: str | os.PathLike) -> None:
    """Draws the loss of each log interval, and its moving average over 1/50 of the intervals."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not by pyplot, which keeps every figure in memory
    axes = figure.subplots()
    window = max(1, len(losses) // 50)
    axes.plot(steps, losses, color="0.8" if window > 1 else "C0", label="loss (per log interval)")
    if window > 1:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], mean, color="C0", label=f"moving average ({window} intervals)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def load_map(load: Float[np.ndarray, "L E"], path: str | os.PathLike) -> None:
    """Draws the expert load as a heat map, a row per layer: white is the even share, blue less, red more."""
    layers, experts = load.shape
    figure = Figure(figsize=(2 + 0.5 * experts, 1.5 + 0.4 * layers), layout="constrained")
    axes = figure.subplots()
    squares = axes.imshow(load, cmap="bwr", vmin=0, vmax=2, aspect="auto")
    if load.size <= 200:
        for (layer, expert), value in np.ndenumerate(load):
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(experts))
        axes.set_yticks(range(layers))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
    figure.colorbar(squares, label="rows / even share")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def roc_curves(
    scores: Mapping[str, tuple[Float[np.ndarray, " members"], Float[np.ndarray, " validation"]]],
    path: str | os.PathLike,
) -> None:
    """Draws the ROC curve of each membership inference attack on logarithmic axes, which show low FPRs.

    `scores` are those of members and of validation images; the dotted line is random guessing.
    """
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    least = 1.0
    for name, (members, validation) in scores.items():
        is_member = np.repeat([True, False], [len(members), len(validation)])
        false_rates, true_rates, _ = roc_curve(is_member, np.concatenate([members, validation]))
        least = min(least, 1 / len(validation), 1 / len(members))
        axes.plot(false_rates, true_rates, drawstyle="steps-post", label=name)
    axes.plot([least, 1], [least, 1], color="0.6", linestyle=":", label="random guessing")
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.02))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
