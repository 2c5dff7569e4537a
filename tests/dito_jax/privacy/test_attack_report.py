"""Results of attacks: compared with slow definitions; coverage of the confidence intervals."""

import numpy as np
import pytest
import scipy.stats

from dito_jax.errors import UserError
from dito_jax.privacy.attack_report import attack_report, auc, share, split_check


pytestmark = pytest.mark.recorded


def normal(seed, shift, num):
    return np.random.default_rng(seed).normal(shift, 1, num)


def test_auc_and_tpr_are_their_definitions():
    members, validation = normal(0, 1, 150).round(1), normal(1, 0, 1200).round(1)  # rounded: many ties
    found = attack_report(members, validation)
    pairs = members[:, None] - validation[None]
    assert found.auc.value == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)), abs=1e-12)
    for rate in (0.01, 0.001):
        allowed = [np.mean(members >= t) for t in np.unique(members) if np.mean(validation >= t) <= rate]
        estimate = found.tpr_at_fpr[str(rate)]
        assert estimate.value == pytest.approx(max(allowed, default=0.0), abs=1e-12)
        hits = round(estimate.value * 150)
        low = scipy.stats.beta.ppf(0.025, hits, 151 - hits) if hits else 0
        high = scipy.stats.beta.ppf(0.975, hits + 1, 150 - hits)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-9)
    best = max((np.mean(members >= t) + np.mean(validation < t)) / 2 for t in np.concatenate([members, validation]))
    assert found.best_accuracy == pytest.approx(best, abs=1e-12) and found.accuracy.value <= best + 0.1
    assert (found.members, found.validation) == (150, 1200)


def test_a_rate_that_the_holdouts_cannot_resolve_is_no_figure():
    found = attack_report(normal(0, 1, 50), normal(1, 0, 360)).tpr_at_fpr
    assert found["0.01"].value is not None
    assert found["0.001"].value is None and "360 non-members cannot resolve" in str(found["0.001"])
    with pytest.raises(UserError, match="scores of 1 members and 5 non-members: wanted at least 2"):
        attack_report(normal(0, 0, 1), normal(0, 0, 5))


def test_intervals_of_the_auc_cover_the_truth_as_often_as_they_say():
    truth = scipy.stats.norm.cdf(0.5 / np.sqrt(2))
    covered = 0
    for seed in range(60):
        found = auc(normal(2 * seed, 0.5, 60), normal(2 * seed + 1, 0, 90), confidence=0.8, seed=seed)
        covered += found.low <= truth <= found.high
    assert 38 <= covered <= 58  # binomial(60, 0.8): outside once in a thousand


@pytest.mark.parametrize("sign", [1, -1])
def test_certainty_is_not_claimed_where_all_pairs_are_ordered_one_way(sign):
    found = auc(sign * (10 + normal(0, 0, 20)), sign * normal(1, 0, 50), confidence=0.95)
    assert found.value == (sign + 1) / 2 and found.high - found.low == pytest.approx(
        0.168, abs=1e-3
    )  # 1 - 0.025^(1/20)


def test_a_threshold_is_counted_where_it_was_not_chosen():
    """Scores of chance: the best threshold of 20 is above a half, the honest one is not."""
    reports = [attack_report(normal(2 * s, 0, 20), normal(2 * s + 1, 0, 20)) for s in range(12)]
    assert np.mean([r.best_accuracy for r in reports]) > 0.58
    assert abs(np.mean([r.accuracy.value for r in reports]) - 0.5) < 0.05
    assert all(r.accuracy.low < 0.5 < r.accuracy.high for r in reports)


def test_a_share_has_the_exact_interval():
    found = share(np.arange(10) < 3)
    assert (found.value, found.low, found.high) == (
        0.3,
        pytest.approx(0.0667, abs=1e-4),
        pytest.approx(0.6525, abs=1e-4),
    )


def images(seed, num, shift=0.0, stripe=0.0):
    found = np.random.default_rng(seed).normal(shift, 1, (num, 8, 8, 1)).astype(np.float32)
    found[:, 0] += stripe
    found[:, 1] -= stripe  # the mean stays
    return found


def test_the_split_is_looked_at():
    fair = split_check(images(0, 200), images(1, 100))
    assert not fair.biased and fair.split_auc.low < 0.5
    assert split_check(images(2, 200, shift=0.2), images(3, 100)).brightness_p < 1e-3
    striped = split_check(images(4, 200, stripe=0.6), images(5, 100))
    assert striped.biased and striped.brightness_p > 0.01 and striped.split_auc.low > 0.5
    with pytest.raises(UserError, match="4 members and 9 non-members: wanted at least 5"):
        split_check(images(0, 4), images(1, 9))
