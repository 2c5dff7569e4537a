"""A simple private baseline: one Gaussian per class, fitted to noised sums.

Guarantees
  - One release of the Gaussian mechanism with dp-accounting's exact sigma: (epsilon, delta)-DP for one image added or
    removed.
  - An image contributes 1 and x / R to the sums of its class, and x^2 / R^2 (elementwise) to the sum of all classes,
    where x are its pixels in [0, 1], clipped to L2 norm R. Each contribution has norm at most 1, together sqrt(3).
  - The set of classes and R do not depend on the data.
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
    """`num` images in [-1, 1], equally many of each class, with normal pixels of noised means and variances."""
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
    """The sums that get noise: of 1 and x / R per class, and of x^2 / R^2; one image contributes at most sqrt(3)."""
    x = (np.clip(images, -1, 1).reshape(len(images), -1).astype(np.float64) + 1) / 2
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _longest(images.shape[1:]))
    of_class = np.eye(num_classes)[labels]
    return of_class.sum(axis=0), of_class.T @ x, np.sum(x**2, axis=0)


def _longest(shape: tuple[int, ...]) -> float:
    """R: half the L2 norm of a white image."""
    return float(np.sqrt(np.prod(shape)) / 2)
