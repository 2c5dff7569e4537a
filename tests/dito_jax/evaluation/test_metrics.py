import numpy as np
import pytest

from dito_jax.data import DigitsData, arrays
from dito_jax.errors import UserError
from dito_jax.evaluation.metrics import ClassAgreement, closest_pairs, frechet_distance, memorisation_ratio, utility


TRAIN, VALIDATION = (arrays(DigitsData().open(split)) for split in ("train", "validation"))
ROUNDING = np.finfo(np.float64).eps


def gaussian_rows(mean, factor, count, seed):
    """Images whose sample mean is `mean` and sample covariance `factor` @ `factor`.T, exactly."""
    z = np.random.default_rng(seed).standard_normal((count, len(mean)))
    z = np.linalg.qr(z - z.mean(axis=0))[0] * np.sqrt(count - 1)
    return (mean + z @ np.asarray(factor).T).reshape(count, 1, -1, 1)


def test_classifier_knows_held_out_digits_and_refuses_wrong_names():
    agreement = ClassAgreement(TRAIN["image"], TRAIN["label"])
    right = agreement(VALIDATION["image"], VALIDATION["label"])
    wrong = agreement(VALIDATION["image"], (VALIDATION["label"] + 1) % 10)
    assert right > 0.95 and wrong <= 1 - right


def test_agreement_is_the_share_of_samples_with_their_own_name():
    agreement = ClassAgreement(TRAIN["image"], TRAIN["label"])
    assert agreement(TRAIN["image"], TRAIN["label"]) == 1  # separable: every scan is named right
    asked = np.where(np.arange(len(TRAIN["label"])) % 2, TRAIN["label"], (TRAIN["label"] + 1) % 10)
    assert agreement(TRAIN["image"], asked) == 0.5


def test_frechet_distance_is_the_closed_form_of_two_by_two_covariances():
    root_a, root_b = np.array([[2.0, 0.0], [1.0, 0.5]]), np.array([[0.3, 1.0], [0.0, 1.5]])
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    assert not np.allclose(cov_a @ cov_b, cov_b @ cov_a)
    # For 2x2, tr(M^1/2) = sqrt(tr M + 2 sqrt(det M)).
    product = cov_a @ cov_b
    overlap = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    wanted = 3.0**2 + 1.0**2 + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    a = gaussian_rows([1.0, 2.0], root_a, 40, seed=0)
    b = gaussian_rows([4.0, 1.0], root_b, 30, seed=1)
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=100 * ROUNDING)
    np.testing.assert_allclose(frechet_distance(b, a), wanted, rtol=100 * ROUNDING)


def test_frechet_distance_of_independent_pixels_is_that_of_each_and_constants_count_by_their_mean():
    scale_a, scale_b = np.array([1.0, 2.0, 0.0, 0.0]), np.array([3.0, 0.5, 0.0, 4.0])
    a = gaussian_rows([0.0, 1.0, 2.0, 3.0], np.diag(scale_a), 50, seed=0)
    b = gaussian_rows([0.0, 1.0, 5.0, 3.0], np.diag(scale_b), 50, seed=1)
    wanted = 3.0**2 + np.sum((scale_a - scale_b) ** 2)
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=100 * ROUNDING)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_frechet_distance_of_a_set_to_itself_is_rounding_even_where_the_covariance_is_singular(count):
    images = TRAIN["image"][:count]
    assert np.any(images.std(axis=0) == 0)
    variance = images.reshape(len(images), -1).var(axis=0, ddof=1, dtype=np.float64).sum()
    assert abs(frechet_distance(images, images)) <= images[0].size * ROUNDING * variance


def test_frechet_distance_wants_two_images():
    with pytest.raises(UserError, match="Fréchet distance of 5 and 1 images: wanted at least 2"):
        frechet_distance(TRAIN["image"][:5], TRAIN["image"][:1])


def line(*points):
    """Images of one pixel."""
    return np.array(points, np.float32).reshape(-1, 1, 1, 1)


def test_memorisation_ratio_is_the_one_worked_by_hand_on_a_line():
    found = memorisation_ratio(line(0, 0.5, 2), train=line(0, 10), validation=line(1, 4))
    assert found.median == 1  # of 0/1, 0.5/0.5, 2/1
    assert found.share_below == 1 / 3
    np.testing.assert_allclose(found.validation_median, (1 / 3 + 4 / 3) / 2, rtol=2 * ROUNDING)
    assert found.validation_share_below == 0.5  # of 1/3, 4/3


def test_copies_of_training_images_are_all_found():
    copies = memorisation_ratio(TRAIN["image"], TRAIN["image"], VALIDATION["image"])
    assert (copies.median, copies.share_below) == (0, 1)
    assert copies.validation_median > 0.5 > copies.validation_share_below


def test_image_that_both_sets_hold_is_no_copy_and_a_held_out_one_is_none():
    found = memorisation_ratio(line(7, 7, 1), train=line(0, 7), validation=line(7, 1, 3))
    assert (found.median, found.share_below) == (1, 0)


def test_memorisation_ratio_wants_a_yardstick():
    with pytest.raises(UserError, match="1 validation images: wanted at least 2"):
        memorisation_ratio(line(1), line(1), line(1))


def test_utility_is_the_accuracy_of_who_has_the_samples_alone():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = (2.0 * labels - 1)[:, None, None, None] + rng.normal(0, 0.3, size=(200, 2, 2, 1))
    assert utility(images[:100], labels[:100], images[100:], labels[100:]) == 1.0
    assert utility(images[:100], 1 - labels[:100], images[100:], labels[100:]) == 0.0
    guessed = utility(rng.normal(size=(100, 2, 2, 1)), labels[:100], images[100:], labels[100:])
    assert 0 <= guessed <= 1 and utility(images[:100:2], labels[:100:2], images[100:], labels[100:]) == 0.5


def test_closest_pairs_are_those_of_least_distance_nearest_first():
    train = np.arange(4.0).reshape(4, 1, 1, 1)
    samples = np.array([0.4, 2.9, 1.0]).reshape(3, 1, 1, 1)
    assert closest_pairs(samples, train, 2) == [(2, 1), (1, 3)]
