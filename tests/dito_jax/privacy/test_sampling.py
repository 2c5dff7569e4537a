"""Batches of private training: Poisson subsampling."""

import numpy as np
import pytest
from jax_privacy.batch_selection import CyclicPoissonSampling
from scipy import stats

from dito_jax.data import DigitsData
from dito_jax.data.digits import Digits
from dito_jax.privacy.keys import StepKeys
from dito_jax.privacy.sampling import PoissonBatches, Units
from dito_jax.privacy.settings import StepPlan


KEYS = StepKeys(bytes(32), "run", 0)


def batches(n=40, q=0.2, room=24, units=None, **options):
    source = DigitsData().open("train")
    return PoissonBatches(source, units or Units(range(n)), StepPlan(1.0, q, n, room), KEYS, **options)


def counted(made, n, steps):
    """(steps, n): how often each example is in each step."""
    found = np.zeros((steps, n), int)
    for step in range(steps):
        chosen = made.chosen(step)
        np.add.at(found[step], chosen[chosen >= 0], 1)
    return found


def test_every_example_has_a_coin_of_its_own_in_every_step():
    n, q, steps = 40, 0.2, 3000
    found = counted(batches(n, q, room=40), n, steps)
    assert found.max() == 1
    by_example = found.sum(axis=0)
    assert stats.chisquare(by_example, np.full(n, by_example.mean())).pvalue > 1e-4
    assert abs(found.mean() - q) < 4 * np.sqrt(q * (1 - q) / found.size)
    # Batch sizes are binomial; turns would make them all alike, and no example would come in two steps running.
    sizes = found.sum(axis=1)
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 0.12
    again = (found[1:] & found[:-1]).mean()
    assert abs(again - q * q) < 0.004
    assert abs(np.corrcoef(found[:, 3], found[:, 4])[0, 1]) < 0.08


def test_the_batch_is_drawn_by_its_steps_own_generator():
    """Which has 256 secret bits (test_keys.py): one seeded by fewer of them would draw others."""
    for step in range(3):
        (wanted,) = CyclicPoissonSampling(0.2, 1, truncated_batch_size=24).batch_iterator(
            40, rng=KEYS.generator(step, "batch")
        )
        chosen = batches().chosen(step)[:, 0]
        np.testing.assert_array_equal(chosen[chosen >= 0], wanted)


def test_what_does_not_fit_is_left_out_by_chance():
    found = counted(batches(40, 0.5, room=10), 40, 1500)
    assert found.sum(axis=1).max() == 10
    by_example = found.sum(axis=0)
    assert stats.chisquare(by_example, np.full(40, by_example.mean())).pvalue > 1e-4


def test_shapes_never_change_and_an_empty_batch_is_a_batch():
    made = batches(5, 0.05, room=8)
    empty = next(step for step in range(200) if np.all(made.chosen(step) < 0))
    full = next(step for step in range(200) if np.any(made.chosen(step) >= 0))
    one, other = made.batch(empty), made.batch(full)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert one["padding"].all() and not one["image"].any() and not other["padding"].all()
    assert one["image"].shape == (8, 1, 8, 8, 1)


def shifted(example, rng):
    return {"image": example["image"] + np.float32(rng.random()), "label": example["label"]}


@pytest.mark.parametrize("augment", [None, staticmethod(shifted)], ids=["as they are", "augmented"])
def test_processes_share_one_batch(augment, monkeypatch):
    monkeypatch.setattr(Digits, "augment", augment)
    whole = batches(room=24).batch(7)
    parts = [batches(room=24, share=i, shares=3).batch(7) for i in range(3)]
    for name in ("image", "label", "padding"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert all(np.array_equal(part["noise_key"], whole["noise_key"]) for part in parts)
    assert not np.array_equal(whole["noise_key"], whole["draw_key"])


def test_rows_are_the_examples_that_were_drawn():
    made, source = batches(), DigitsData().open("train")
    batch, chosen = made.batch(3), made.chosen(3)
    for row in np.flatnonzero(chosen[:, 0] >= 0):
        example = source[int(chosen[row, 0])]
        np.testing.assert_array_equal(batch["image"][row, 0], example["image"])
        assert batch["label"][row, 0] == example["label"]


def test_users_come_whole_and_with_so_many_images_at_most():
    owners = np.array([7, 7, 7, 3, 9, 9])
    made = batches(3, 0.5, room=3, units=Units.users(owners), images_per_unit=2)
    seen = set()
    for step in range(300):
        for row in made.chosen(step):
            of_user = row[row >= 0]
            assert len({owners[example] for example in of_user}) <= 1 and len(set(of_user)) == len(of_user)
            seen |= set(of_user)
            assert len(of_user) in (0, 1, 2) and (len(of_user) != 1 or owners[of_user[0]] == 3)
    assert seen == set(range(6))
