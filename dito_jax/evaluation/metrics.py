"""Metrics of sample quality without pretrained networks: float64, from arrays of images in [-1, 1].

Distances are between pixels, so the metrics can only compare runs on small images of the same data set.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from dito_jax.errors import UserError


class ClassAgreement:
    """Class accuracy of images under a classifier that was trained on real images.

    The classifier is a support vector machine with a Gaussian kernel, exp(-|x - y|^2 / (d var x)), d pixels, C = 10.
    On validation images the metric is the accuracy of the classifier, which samples as good as real ones would reach.
    """

    def __init__(self, images: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"]):
        from sklearn.svm import SVC  # scikit-learn is slow to import: where it is needed alone

        self._classifier = SVC(C=10, kernel="rbf", gamma="scale").fit(_rows(images), labels)

    def __call__(self, images: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"]) -> float:
        """Share of `images` whose predicted class equals their label."""
        return float(np.mean(self._classifier.predict(_rows(images)) == labels))


def utility(
    images: Float[np.ndarray, "B h w c"],
    labels: Integer[np.ndarray, " B"],
    validation: Float[np.ndarray, "validation h w c"],
    validation_labels: Integer[np.ndarray, " validation"],
) -> float:
    """Downstream utility: validation accuracy of a classifier that is trained on the images only.

    The classifier is logistic regression on pixels; for images of a single class it always predicts that class.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return float(np.mean(validation_labels == labels[0]))
    classifier = LogisticRegression(max_iter=2000).fit(_rows(images), labels)
    return float(classifier.score(_rows(validation), validation_labels))


def frechet_distance(a: Float[np.ndarray, "B h w c"], b: Float[np.ndarray, "S h w c"]) -> float:
    """Squared Wasserstein distance of the Gaussians with the means and covariances of two sets of images.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in squared units of the images, summed
    over pixels (Dowson and Landau, J. Multivariate Anal. 12, 1982). With S = R' R the trace of the root is the sum of
    the singular values of R_a R_b', which needs no matrix square root and works for singular covariances (constant
    pixels, fewer images than pixels). The distance is larger for fewer images: compare sets of equal size.

    Raises:
      UserError: a set has fewer than two images, so it has no covariance.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"Fréchet distance of {len(a)} and {len(b)} images: wanted at least 2 in each set.")
    a, b = _rows(a), _rows(b)
    shift = a.mean(axis=0) - b.mean(axis=0)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(shift @ shift + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap)


def _covariance_root(rows: Float[np.ndarray, "B d"]) -> Float[np.ndarray, "r d"]:
    """R with R' R the unbiased covariance of the columns; r = min(B, d)."""
    return np.linalg.qr(rows - rows.mean(axis=0), mode="r") / np.sqrt(len(rows) - 1)


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """Result of `memorisation_ratio`; without memorisation samples have the values of validation images."""

    median: float
    share_below: float
    validation_median: float
    validation_share_below: float
    threshold: float


def memorisation_ratio(
    samples: Float[np.ndarray, "samples h w c"],
    train: Float[np.ndarray, "train h w c"],
    validation: Float[np.ndarray, "validation h w c"],
    *,
    threshold: float = 0.5,
) -> Memorisation:
    """Memorisation: whether samples are closer to training images than validation images are.

    ratio(x) = min_t |x - t| / min_h |x - h|, t over `train` and h over `validation`; 0 is a copy of a training image.
    The result has the median of the ratio and its share below `threshold`, over the samples, and as a baseline over the
    validation images, each compared with the other validation images. The nearest image of a larger set is closer, so
    even without memorisation the ratio is below 1 if there are more training than validation images. Samples and
    baseline are compared with the same two sets, so the effect is the same in both; no training image is left out to
    make the sets equal, since a copy of it would be missed.

    Raises:
      UserError: fewer than two validation images.
    """
    samples, train, validation = _rows(samples), _rows(train), _rows(validation)
    if len(validation) < 2:
        raise UserError(f"{len(validation)} validation images: wanted at least 2, to compare one with another.")
    of_samples = _ratio(_nearest(train, samples), _nearest(validation, samples))
    of_validation = _ratio(_nearest(train, validation), _nearest(validation))
    return Memorisation(
        median=float(np.median(of_samples)),
        share_below=float(np.mean(of_samples < threshold)),
        validation_median=float(np.median(of_validation)),
        validation_share_below=float(np.mean(of_validation < threshold)),
        threshold=threshold,
    )


def closest_pairs(
    samples: Float[np.ndarray, "samples h w c"], train: Float[np.ndarray, "train h w c"], num: int
) -> list[tuple[int, int]]:
    """The `num` samples closest to a training image, closest first: (index of the sample, index of that image)."""
    index = _neighbours(_rows(train))
    distance, nearest = index.kneighbors(_rows(samples))
    order = np.argsort(distance[:, 0], kind="stable")[:num]
    return [(int(i), int(nearest[i, 0])) for i in order]


def _nearest(
    references: Float[np.ndarray, "S d"], queries: Float[np.ndarray, "B d"] | None = None
) -> Float[np.ndarray, " B"]:
    """Distance of each query to the nearest reference; without queries, of each reference to the nearest other one."""
    index = _neighbours(references)
    nearest = index.kneighbors(queries, return_distance=False)[:, 0]
    # Recomputed: the search uses |x|^2 - 2xy + |y|^2, which is not exactly zero for a copy.
    return np.linalg.norm((references if queries is None else queries) - references[nearest], axis=1)


def _neighbours(rows: Float[np.ndarray, "S d"]) -> Any:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=1, algorithm="brute").fit(rows)


def _ratio(near: Float[np.ndarray, " B"], far: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """near / far; 1 for an image that is in both sets."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((near == 0) & (far == 0), 1.0, near / far)


def _rows(images: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B d"]:
    return np.asarray(images, np.float64).reshape(len(images), -1)
