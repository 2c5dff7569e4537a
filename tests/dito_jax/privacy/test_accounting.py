"""Privacy accounting: published values, composition, and rounding that never lowers epsilon."""

import dp_accounting
import pytest

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, epsilon, noise_multiplier, remaining_steps, truncation


@pytest.mark.parametrize(
    ("examples", "batch", "steps", "budget", "delta", "sigma"),
    [
        (60_000, 4096, 4394, 10, 1e-5, 2.380),
        (60_000, 4096, 4394, 1, 1e-5, 16.921),
        (60_000, 4096, 4394, 0.2, 1e-5, 73.877),
        (60_000, 4096, 2197, 10, 1e-5, 1.760),
        (60_000, 4096, 2197, 1, 1e-5, 11.991),
        (60_000, 4096, 2197, 0.2, 1e-5, 52.232),
        (1437, 256, 561, 10, 1e-4, 2.058),
        (1437, 256, 561, 3, 1e-4, 5.249),
        (1437, 256, 561, 1, 1e-4, 13.507),
    ],
)
def test_noise_is_that_of_the_published_settings_and_never_too_little(examples, batch, steps, budget, delta, sigma):
    found = noise_multiplier(examples, batch, steps, budget, delta)
    assert found == pytest.approx(sigma, abs=1e-3)
    assert epsilon({Release(batch / examples, found): steps}, delta) <= budget
    assert epsilon({Release(batch / examples, found * (1 - 1e-4)): steps}, delta) > budget


def test_poisson_sampling_is_not_the_same_as_every_example_in_turn():
    """Shuffled epochs have no amplification to rely on: what the run's sampler must not be accounted as."""
    poisson = epsilon({Release(4096 / 60_000, 3.0): 2000}, 1e-5)
    in_turn = epsilon({Release(1.0, 3.0): 136}, 1e-5)  # 136 epochs, each example once in each
    assert poisson == pytest.approx(4.67, abs=0.01) and in_turn == pytest.approx(23.5, abs=0.1)


def test_truncated_batches_are_accounted_and_cost_nothing_where_they_are_roomy():
    plain = epsilon({Release(4096 / 60_000, 3.0): 2000}, 1e-5)
    roomy = epsilon({Release(4096 / 60_000, 3.0, 60_000, 4416): 2000}, 1e-5)
    tight = epsilon({Release(4096 / 60_000, 3.0, 60_000, 4096): 2000}, 1e-5)
    assert plain <= roomy < plain * 1.001 < tight


def test_accountants_are_asked_with_their_relation_by_name():
    """Replacing one example costs about twice as much; the default must not be mistaken for it."""
    release = Release(4096 / 60_000, 3.0)
    relation = dp_accounting.NeighboringRelation
    accountant = dp_accounting.pld.PLDAccountant(neighboring_relation=relation.REPLACE_ONE)
    accountant.compose(dp_accounting.SelfComposedDpEvent(release.event, 2000))
    assert accountant.get_epsilon(1e-5) == pytest.approx(10.18, abs=0.01)
    assert epsilon({release: 2000}, 1e-5) < 5


def test_remaining_steps_are_the_last_that_fit():
    release, other = Release(256 / 1437, 2.1), Release(0.05, 1.5)
    spent = {release: 100, other: 20}
    left = remaining_steps(spent, release, 8.0, 1e-4)
    assert epsilon({release: 100 + left, other: 20}, 1e-4) <= 8 < epsilon({release: 101 + left, other: 20}, 1e-4)
    assert remaining_steps({release: 5000}, release, 8.0, 1e-4) == 0


def test_a_batch_has_room_for_all_but_what_delta_forgives():
    room = truncation(1437, 256 / 1437, steps=561, delta=1e-4, multiple=8)
    assert room % 8 == 0 and 320 < room < 360


@pytest.mark.parametrize(
    ("values", "words"),
    [((0.0, 1.0), "sampling_prob is 0.0"), ((0.1, 0.0), "without noise"), ((0.1, 1.0, 10), "needs both")],
)
def test_what_cannot_be_is_one_line(values, words):
    with pytest.raises(UserError, match=words):
        Release(*values)
