"""Synthetic digits drawn from pen strokes: public pretraining data for a private run on the digits.

Shapes, slants and widths are chosen by hand and not fitted to any scans, so they cost no privacy; no download.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int32

from dito_jax.data.sources import DataError, Example, Split


NUM_CLASSES = 10
FINE = 4  # supersampling: each pixel is the mean of FINE x FINE samples
VALIDATION_ONE_IN = 5


@dataclasses.dataclass(frozen=True)
class StrokesData:
    """Synthetic digits drawn from pen strokes; no download, and no cost in privacy."""

    num: int = 4000
    """Number of training images, with equally many of each class; validation has a fifth as many."""
    size: int = 8
    """Side of an image in pixels."""
    seed: int = 0
    """Seed of the generated images."""

    def open(self, split: Split) -> "Strokes":
        """Draws the images of one split; about 0.5 ms per image.

        Raises:
          DataError: fewer than 10 images, or images smaller than 4 x 4 pixels.
        """
        if self.num < NUM_CLASSES or self.size < 4:
            raise DataError(f"strokes: num {self.num}, size {self.size}: wanted at least 10 images of 4 x 4 pixels.")
        num = self.num if split == "train" else max(self.num // VALIDATION_ONE_IN, NUM_CLASSES)
        return Strokes(num, self.size, self.seed, split)


class Strokes:
    """One split in memory. Image i is a function of the seed, the split and i only; its class is i mod 10."""

    num_classes = NUM_CLASSES
    augment = None

    def __init__(self, num: int, size: int, seed: int, split: Split):
        self.image_shape = (size, size, 1)
        self.labels: Int32[np.ndarray, " B"] = (np.arange(num) % NUM_CLASSES).astype(np.int32)
        chances = [np.random.default_rng([seed, split == "validation", i]) for i in range(num)]
        pictures = [_drawn(int(label), size, rng) for label, rng in zip(self.labels, chances, strict=True)]
        self.images: Float32[np.ndarray, "B h w 1"] = np.stack(pictures)[..., None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.images[index], label=self.labels[index])


def _arc(x: float, y: float, wide: float, high: float, begin: int, end: int) -> list[tuple[float, float]]:
    """Points of an elliptic arc around (x, y) between two angles in degrees; 0 is right, 90 is down."""
    angles = np.radians(np.linspace(begin, end, 13))
    return [(x + wide * np.cos(a), y + high * np.sin(a)) for a in angles]


# The strokes of each digit as polylines in the unit square; y points down.
DIGITS: tuple[tuple[list[tuple[float, float]], ...], ...] = (
    (_arc(0.5, 0.5, 0.24, 0.38, -90, 270),),
    ([(0.36, 0.3), (0.52, 0.12), (0.52, 0.88)],),
    ([*_arc(0.5, 0.34, 0.22, 0.22, -170, 30), (0.28, 0.86), (0.76, 0.86)],),
    ([*_arc(0.46, 0.31, 0.22, 0.19, -160, 90), *_arc(0.46, 0.68, 0.25, 0.2, -90, 150)],),
    ([(0.55, 0.12), (0.24, 0.6), (0.8, 0.6)], [(0.62, 0.36), (0.62, 0.9)]),
    ([(0.72, 0.13), (0.34, 0.13), (0.32, 0.46), *_arc(0.46, 0.65, 0.25, 0.22, -110, 150)],),
    ([(0.62, 0.12), (0.4, 0.34), *_arc(0.5, 0.67, 0.21, 0.2, -180, 180)],),
    ([(0.24, 0.14), (0.76, 0.14), (0.42, 0.88)],),
    (_arc(0.5, 0.31, 0.19, 0.18, 90, 450), _arc(0.5, 0.68, 0.23, 0.19, -90, 270)),
    (_arc(0.5, 0.33, 0.2, 0.2, 0, 360), [(0.7, 0.33), (0.66, 0.62), (0.5, 0.88)]),
)


def _drawn(label: int, size: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w"]:
    """One image in [-1, 1], white on black, with random shear, rotation, scale, shift, jitter and pen width."""
    lean, turn = rng.uniform(-0.25, 0.25), np.radians(rng.uniform(-10, 10))
    stretch = rng.uniform(0.75, 1.1, size=2)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    warp = turned @ np.array([[stretch[0], -lean], [0, stretch[1]]])
    shift = 0.5 + rng.uniform(-0.06, 0.06, size=2)
    pen = rng.uniform(0.05, 0.1)
    lines = [np.array(line) + rng.normal(0, 0.012, size=(len(line), 2)) for line in DIGITS[label]]
    lines = [(line - 0.5) @ warp.T + shift for line in lines]
    begins, ends = (np.concatenate([line[cut] for line in lines]) for cut in (slice(None, -1), slice(1, None)))
    at = (np.arange(size * FINE) + 0.5) / (size * FINE)
    points = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)  # (x, y), row by row
    inked = (_distance(points, begins, ends) < pen).reshape(size, FINE, size, FINE)
    return (2 * inked.mean(axis=(1, 3)) - 1).astype(np.float32)


def _distance(
    points: Float[np.ndarray, "P 2"], begins: Float[np.ndarray, "S 2"], ends: Float[np.ndarray, "S 2"]
) -> Float[np.ndarray, " P"]:
    """Distance of each point to the nearest segment."""
    along = ends - begins
    away = points[:, None] - begins
    share = np.sum(away * along, axis=2) / np.maximum(np.sum(along**2, axis=1), 1e-12)
    nearest = away - np.clip(share, 0, 1)[..., None] * along
    return np.sqrt(np.sum(nearest**2, axis=2)).min(axis=1)
