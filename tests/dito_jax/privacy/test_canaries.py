"""Canaries: inclusion in the data; the bounds refute mechanisms with a bug and no correct one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.data import DigitsData
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, epsilon
from dito_jax.privacy.canaries import (
    CanarySource,
    audit_mechanism,
    epsilon_bounds,
    make_canaries,
    planted,
    verdict,
)
from dito_jax.privacy.keys import secret_path
from dito_jax.telemetry.run_directory import RunDirectory


pytestmark = pytest.mark.recorded


DELTA, MANY = 1e-5, 5000


@pytest.mark.parametrize(
    "sigma, auc, one_run, fdp, clopper_pearson",
    [(0.5, 0.922, 2.42, 4.94, 3.63), (1.0, 0.769, 1.26, 2.11, 1.61), (2.0, 0.641, 0.57, 0.76, 0.53)],
)
def test_a_sound_mechanism_has_the_bounds_that_others_found(sigma, auc, one_run, fdp, clopper_pearson):
    """One run's differ by a quarter either way, by the luck of coins and noise; theirs is one run, ours are ten."""
    runs = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        included = rng.random(MANY) < 0.5
        scores = included + sigma * rng.normal(size=MANY)
        runs.append(epsilon_bounds(scores, included, delta=DELTA, confidence=1 - 3 * 0.05))  # each bound at 95 %
    assert np.mean([found.auc for found in runs]) == pytest.approx(auc, abs=0.015)
    assert np.mean([found.one_run for found in runs]) == pytest.approx(one_run, rel=0.25)
    assert np.mean([found.one_run_fdp for found in runs]) == pytest.approx(fdp, rel=0.25)
    assert np.mean([found.clopper_pearson for found in runs]) == pytest.approx(clopper_pearson, rel=0.25)
    claimed, found = epsilon({Release(1.0, sigma): 1}, DELTA), runs[-1]
    assert found.largest < claimed and verdict(found, claimed) == "not refuted"
    assert verdict(found, 0.9 * found.largest) == "refuted"
    assert found.num_in + found.num_out == MANY and found.num_in == included.sum()


def summed(sigma, *, clip=1.0, noise=True, key_of=lambda key, step: key, divide=1):
    """Clip, add, add noise: a mechanism, and the bugs that it may have."""
    calls = []

    def private_sum(vectors, present, key):
        calls.append(0)
        norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
        total = jnp.sum(jnp.where(present[:, None], vectors * jnp.minimum(1, clip / norms), 0), axis=0)
        drawn = jax.random.normal(key_of(key, len(calls)), total.shape)
        return total + noise * sigma / divide * drawn

    return private_sum


def audited(private_sum, steps=2, **options):
    return audit_mechanism(
        private_sum, dimension=1500, num_canaries=1200, steps=steps, key=jax.random.key(0), delta=DELTA, **options
    )


CLAIMED = epsilon({Release(1.0, 1.0): 2}, DELTA)  # two steps at sigma 1


def test_a_sound_mechanism_is_not_refuted():
    found = audited(summed(1.0))
    assert verdict(found, CLAIMED) == "not refuted" and found.largest > 0.8  # it does look
    assert verdict(audited(summed(1.0), alternate=True), CLAIMED) == "not refuted"


@pytest.mark.parametrize(
    "bug, options",
    {
        "no noise": (dict(noise=False), {}),
        "noise over the batch": (dict(divide=8), {}),
        "no clipping": (dict(clip=1e9), {}),
        "one key for all steps": (dict(key_of=lambda key, step: jax.random.key(9)), dict(alternate=True)),
    }.values(),
    ids=lambda value: str(sorted(value)),
)
def test_a_mechanism_with_a_bug_is_refuted(bug, options):
    found = audited(summed(1.0, **bug), **options)
    assert verdict(found, CLAIMED) == "refuted", found


def test_what_cannot_be_audited_is_said():
    with pytest.raises(UserError, match="9 canaries in 4 dimensions: wanted at most one per dimension"):
        audit_mechanism(summed(1.0), dimension=4, num_canaries=9, steps=1, key=jax.random.key(0), delta=DELTA)
    with pytest.raises(UserError, match="1 steps: wanted at least 2"):
        audited(summed(1.0), steps=1, alternate=True)
    with pytest.raises(UserError, match="3 of 3 canaries are included: use more"):
        epsilon_bounds(np.ones(3), np.ones(3, bool), delta=DELTA)
    with pytest.raises(UserError, match="delta 0, confidence 0.95"):
        epsilon_bounds(np.ones(3), np.arange(3) < 1, delta=0)
    with pytest.raises(UserError, match="0 canaries, a secret of 1 bytes"):
        make_canaries(0, (8, 8, 1), 10, secret=b"x")


def test_canaries_follow_the_data_and_their_coins_are_fair():
    source = DigitsData().open("train")
    with_canaries = CanarySource(source, 400, secret=b"one")
    canaries = with_canaries.canaries
    assert len(with_canaries) == len(source) + canaries.included.sum() and 160 < canaries.included.sum() < 240
    np.testing.assert_array_equal(with_canaries[3]["image"], source[3]["image"])
    first = np.flatnonzero(canaries.included)[0]
    appended = with_canaries[len(source)]
    np.testing.assert_array_equal(appended["image"], canaries.image[first])
    assert appended["label"] == canaries.label[first] and set(np.unique(canaries.image)) == {-1, 1}
    with pytest.raises(IndexError):
        with_canaries[len(with_canaries)]
    again, other = (make_canaries(400, (8, 8, 1), 10, secret=secret) for secret in (b"one", b"two"))
    np.testing.assert_array_equal(again.image, canaries.image)
    assert 120 < (other.included != canaries.included).sum() < 280
    assert 0.45 < (canaries.image[canaries.included] == 1).mean() < 0.55  # a coin is not in its picture


def test_a_run_keeps_its_canaries_and_notices_others(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    source, run = DigitsData().open("train"), RunDirectory(tmp_path / "run")
    first = planted(source, 12, run).canaries
    np.testing.assert_array_equal(planted(source, 12, run).canaries.included, first.included)
    kept = json.loads((run.path / "canaries.json").read_text())
    held = secret_path(kept["secret"])
    secret = held.read_bytes()
    assert len(secret) == 32 and held.stat().st_mode & 0o077 == 0 and secret.hex() not in str(kept)
    np.testing.assert_array_equal(make_canaries(12, (8, 8, 1), 10, secret=secret).image, first.image)
    with pytest.raises(UserError, match="started with 12 canaries, not 13"):
        planted(source, 13, run)
    held.write_bytes(bytes(32))
    with pytest.raises(UserError, match="not the secret of this run's canaries"):
        planted(source, 12, run)
    held.unlink()
    with pytest.raises(UserError, match="not the secret of this run's canaries"):
        planted(source, 12, run)
    assert not held.exists()
    other = planted(source, 12, RunDirectory(tmp_path / "other")).canaries
    assert (other.image != first.image).any()
