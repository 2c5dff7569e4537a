"""A simple private model to measure others by: a Gaussian for each class, of noised sums.

Guarantees
  - One Gaussian mechanism, at once, with dp-accounting's exact sigma: (epsilon, delta) for one image added or removed.
  - An image adds to its class 1 and x / R, and to all classes together x^2 / R^2 (elementwise), x being its pixels in
    [0, 1], shortened to the length R: each of the three is at most 1 long, together they are at most sqrt(3).
  - Which classes there are, and R, are no matter of the data.
"""

import numpy as np
from dp_accounting import get_sigma_gaussian
from jaxtyping import Float, Integer


def gaussian_samples(
    images: Float[np.ndarray, "B h w c"],
    labels: Integer[np.ndarray, " B"],
    num_classes: int,
    *,
    epsilon: float,
    delta: float,
    num: int,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "num h w c"], Integer[np.ndarray, " num"]]:
    """`num` images in [-1, 1], as many of each class, of normal pixels with noised means and variances."""
    rng, shape = np.random.default_rng(seed), images.shape[1:]
    longest, sigma = _longest(shape), get_sigma_gaussian(epsilon, delta)
    noised = [total + np.sqrt(3) * sigma * rng.normal(size=total.shape) for total in sums(images, labels, num_classes)]
    counts, firsts, seconds = np.maximum(noised[0], 1), longest * noised[1], longest**2 * noised[2]
    means = firsts / counts[:, None]
    within = seconds / counts.sum() - counts / counts.sum() @ means**2
    drawn = np.arange(num) % num_classes
    pixels = means[drawn] + np.sqrt(np.maximum(within, 1e-3)) * rng.normal(size=(num, means.shape[1]))
    return (2 * np.clip(pixels, 0, 1) - 1).reshape(num, *shape).astype(np.float32), drawn


def sums(
    images: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"], num_classes: int
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, "classes d"], Float[np.ndarray, " d"]]:
    """Of 1 and x / R by class, and of x^2 / R^2: what the mechanism noises, each image's part at most sqrt(3) long."""
    x = (np.clip(images, -1, 1).reshape(len(images), -1).astype(np.float64) + 1) / 2
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _longest(images.shape[1:]))
    of_class = np.eye(num_classes)[labels]
    return of_class.sum(axis=0), of_class.T @ x, np.sum(x**2, axis=0)


def _longest(shape: tuple[int, ...]) -> float:
    """R: half of what a white image has."""
    return float(np.sqrt(np.prod(shape)) / 2)
