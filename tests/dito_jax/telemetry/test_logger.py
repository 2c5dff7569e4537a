"""The metrics logger: skipped steps do not enter the means of a log interval."""

import math

from dito_jax.telemetry.logger import means
from dito_jax.training.health import FINE, LOSS_SPIKE, NOT_FINITE


def step(loss: float, bad: int = FINE) -> dict[str, float]:
    return {"loss": loss, "gradient_norm": 2 * loss, "bad": bad}


def test_means_are_of_the_good_steps_and_the_others_are_counted():
    told = means([step(1.0), step(math.nan, NOT_FINITE), step(4.0), step(900.0, LOSS_SPIKE)])
    assert told == {"loss": 2.5, "gradient_norm": 5.0, "bad_steps": 2}


def test_without_a_good_step_there_is_no_mean():
    told = means([step(math.inf, NOT_FINITE)])
    assert math.isnan(told["loss"]) and told["bad_steps"] == 1
