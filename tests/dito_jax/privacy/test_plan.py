"""The plan of a private run with a small max_batch: the accountant includes the truncation."""

import dp_accounting
import pytest

from dito_jax.privacy.accounting import Release, epsilon
from dito_jax.privacy.run import make_plan, release_of
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.training.program import LoopConfig


BUDGET, DELTA, STEPS, UNITS, BATCH = 0.3, 1e-4, 5, 1000, 500


def truncated(sigma, room, steps=STEPS):
    """The epsilon that dp-accounting itself gives."""
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=UNITS, sampling_probability=BATCH / UNITS, truncated_batch_size=room, noise_multiplier=sigma
    )
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = dp_accounting.pld.PLDAccountant(neighboring_relation=relation)
    return accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps)).get_epsilon(DELTA)


def test_a_plan_with_little_room_has_the_noise_that_truncation_costs():
    """Half the batches are cut off: the noise that would do without that is a third of what is needed."""
    privacy = PrivacyConfig(epsilon=BUDGET, delta=DELTA, max_batch=504, spare_steps=2)
    plan = make_plan(privacy, LoopConfig(steps=STEPS - 2, batch_size=BATCH), UNITS, 8)
    assert (plan.sampling_prob, plan.num_units, plan.max_batch) == (0.5, UNITS, 504)
    assert truncated(plan.noise_multiplier, 504) <= BUDGET < truncated(plan.noise_multiplier * (1 - 1e-4), 504)
    release = release_of(plan)
    assert epsilon({release: STEPS}, DELTA) == pytest.approx(truncated(plan.noise_multiplier, 504), rel=1e-6)
    assert release.adjacency == "zero-out"
    assert epsilon({Release(0.5, plan.noise_multiplier): STEPS}, DELTA) < 0.6 * BUDGET


@pytest.mark.parametrize(("room", "told"), [(7, (8, 7)), (8, (None, None)), (9, (None, None))])
def test_what_a_step_reveals_is_told_with_its_room_where_somebody_may_be_left_out(room, told):
    release = release_of(StepPlan(2.0, 0.5, 8, room))
    assert (release.sampling_prob, release.noise_multiplier) == (0.5, 2.0)
    assert (release.num_examples, release.max_batch) == told
