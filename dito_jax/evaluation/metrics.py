"""How good samples are, without any downloaded network: float64 figures of plain arrays of images in [-1, 1].

Distances are between pixels, so the figures compare runs on small images of one data set and nothing else.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from dito_jax.errors import UserError


class ClassAgreement:
    """Share of images that a classifier, trained on real ones, takes for the class they should be of.

    The classifier is a support vector machine with a Gaussian kernel, exp(-|x - y|^2 / (d var x)), d
    pixels, C = 10. On held-out images it gives its own accuracy: what samples that are as good as real
    would reach.
    """

    def __init__(self, images: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"]):
        from sklearn.svm import SVC  # scikit-learn is slow to import: where it is needed alone

        self._classifier = SVC(C=10, kernel="rbf", gamma="scale").fit(_rows(images), labels)

    def __call__(self, images: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"]) -> float:
        """The share of `images` whose predicted class is the one in `labels`."""
        return float(np.mean(self._classifier.predict(_rows(images)) == labels))


def utility(
    images: Float[np.ndarray, "B h w c"],
    labels: Integer[np.ndarray, " B"],
    validation: Float[np.ndarray, "validation h w c"],
    validation_labels: Integer[np.ndarray, " validation"],
) -> float:
    """What the images are worth to somebody who has no others: held-out accuracy of a classifier trained on them alone.

    The classifier is logistic regression on pixels; with images of one class it would know that one only.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return float(np.mean(validation_labels == labels[0]))
    classifier = LogisticRegression(max_iter=2000).fit(_rows(images), labels)
    return float(classifier.score(_rows(validation), validation_labels))


def frechet_distance(a: Float[np.ndarray, "B h w c"], b: Float[np.ndarray, "S h w c"]) -> float:
    """Squared Wasserstein distance of the Gaussians with the means and covariances of two sets of images.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in squared units of the images, summed
    over pixels (Dowson and Landau, J. Multivariate Anal. 12, 1982). Where S = R' R, the trace of the root is
    the sum of the singular values of R_a R_b': no matrix root, and no root of an eigenvalue that is rounding,
    so covariances without an inverse (constant pixels, fewer images than pixels) are as good as any. Few
    images make the distance larger: compare sets of one size.

    Raises:
      UserError: a set has no covariance, for want of a second image.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"sets of {len(a)} and {len(b)} images: give at least 2 in each, for a covariance.")
    a, b = _rows(a), _rows(b)
    shift = a.mean(axis=0) - b.mean(axis=0)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(shift @ shift + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap)


def _covariance_root(rows: Float[np.ndarray, "B d"]) -> Float[np.ndarray, "r d"]:
    """An R such that R' R is the covariance of the columns, unbiased; r is the smaller of B and d."""
    return np.linalg.qr(rows - rows.mean(axis=0), mode="r") / np.sqrt(len(rows) - 1)


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """What `memorisation_ratio` finds; a model that does not memorise has the figures of held-out images."""

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
    """Whether samples lie nearer to the training images than images that the model cannot know do.

    ratio(x) = min_t |x - t| / min_h |x - h|, t over `train` and h over `validation`; 0 is a copy of a training
    image. Reported are its median and the share of it below `threshold`, over the samples; and, as the
    yardstick, over the held-out images, each measured against the other held-out ones. The larger set has
    something near anything, so without memorisation the ratio is below 1 where there are more training
    images than held-out ones. Samples and yardstick are measured against the same two sets, so that this is
    in both alike, and no training image, hence no copy of one, is left out to make the sets equal.

    Raises:
      UserError: fewer than two held-out images, of which none has another to be measured against.
    """
    samples, train, validation = _rows(samples), _rows(train), _rows(validation)
    if len(validation) < 2:
        raise UserError(f"{len(validation)} held-out images: give at least 2, to measure one against another.")
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
    """The `num` samples that lie nearest to a training image, nearest first, each with the number of that image."""
    index = _neighbours(_rows(train))
    distance, nearest = index.kneighbors(_rows(samples))
    order = np.argsort(distance[:, 0], kind="stable")[:num]
    return [(int(i), int(nearest[i, 0])) for i in order]


def _nearest(
    references: Float[np.ndarray, "S d"], queries: Float[np.ndarray, "B d"] | None = None
) -> Float[np.ndarray, " B"]:
    """Distance of each query to the nearest reference; without queries, of each of these to the next one."""
    index = _neighbours(references)
    nearest = index.kneighbors(queries, return_distance=False)[:, 0]
    # Searched by |x|^2 - 2xy + |y|^2, which leaves rounding where a copy's distance is exactly zero.
    return np.linalg.norm((references if queries is None else queries) - references[nearest], axis=1)


def _neighbours(rows: Float[np.ndarray, "S d"]) -> Any:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=1, algorithm="brute").fit(rows)


def _ratio(near: Float[np.ndarray, " B"], far: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """near / far; an image that both sets hold is as near to one as to the other."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((near == 0) & (far == 0), 1.0, near / far)


def _rows(images: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B d"]:
    return np.asarray(images, np.float64).reshape(len(images), -1)
