"""The private baseline: its noise matches the budget, and its utility."""

import numpy as np
import pytest

from dito_jax.data import DigitsData, arrays
from dito_jax.evaluation.metrics import utility
from dito_jax.privacy import baseline
from dito_jax.privacy.baseline import gaussian_samples, sums


pytestmark = pytest.mark.recorded


TRAIN, VALIDATION = (arrays(DigitsData().open(split)) for split in ("train", "validation"))


def samples(epsilon, seed=0, data=TRAIN):
    return gaussian_samples(data["image"], data["label"], 10, epsilon=epsilon, delta=1e-4, num=1000, seed=seed)


def test_more_budget_is_worth_more_and_nothing_is_worth_as_much_as_the_data():
    worth = [utility(*samples(epsilon), VALIDATION["image"], VALIDATION["label"]) for epsilon in (0.05, 1.0, 100.0)]
    real = utility(TRAIN["image"], TRAIN["label"], VALIDATION["image"], VALIDATION["label"])
    assert worth[0] < worth[1] - 0.1 and 0.75 < worth[1] < worth[2] < real and real > 0.95
    images, labels = samples(1.0)
    assert images.shape == (1000, 8, 8, 1) and np.abs(images).max() <= 1 and np.bincount(labels).tolist() == [100] * 10


def test_without_noise_class_means_are_the_datas(monkeypatch):
    monkeypatch.setattr(baseline, "get_sigma_gaussian", lambda *_: 0.0)
    images, labels = gaussian_samples(TRAIN["image"], TRAIN["label"], 10, epsilon=1.0, delta=1e-4, num=40_000)
    middle = (slice(None), 3, 4, 0)
    for digit in (0, 1):
        real, drawn = TRAIN["image"][TRAIN["label"] == digit][middle], images[labels == digit][middle]
        assert abs(real.mean() - np.median(drawn)) < 0.1  # what reaches past white is cut, and long images shortened


def test_one_image_moves_the_sums_by_the_multiple_that_noise_has_at_most():
    rng = np.random.default_rng(0)
    of = lambda *pictures: np.concatenate(
        [total.ravel() for total in sums(np.stack(pictures), np.arange(len(pictures)) % 10, 10)]
    )
    white, scan = np.ones((8, 8, 1), np.float32), TRAIN["image"][3]
    dot, loud = -white, 1e6 * rng.normal(size=(8, 8, 1)).astype(np.float32)
    dot[0, 0] = 1
    moved = {name: np.linalg.norm(of(scan, one) - of(scan)) for name, one in
             {"white": white, "dot": dot, "loud": loud, "scan": TRAIN["image"][9]}.items()}  # fmt: skip
    assert all(1 < distance <= np.sqrt(3) + 1e-9 for distance in moved.values()), moved
    assert max(moved.values()) > 1.4
