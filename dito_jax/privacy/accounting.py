"""Privacy accounting of DP-SGD by privacy loss distributions (dp-accounting's PLD accountant).

Guarantees. Let each step publish a sum of gradients, one per unit (an example or a user) with norm at most C, plus
Gaussian noise of standard deviation sigma C, with units drawn as its `Release` describes. Then all steps together are
(epsilon, delta)-DP for the epsilon that `epsilon` returns. It is an upper bound (pessimistic PLDs), up to float64
rounding, and intended for a delta of at least 1e-12.

Adjacency. Without truncation: one unit is added or removed. With truncation the number of units is an argument of the
analysis, so neighbouring data sets have the same size: one unit becomes empty ("zero-out", dp-accounting's
REPLACE_SPECIAL, https://arxiv.org/abs/2103.00039, definition 1.1). Untruncated releases have the same epsilon under
both, so a mixture is accounted as zero-out. Neither is "one unit is replaced by another", which costs about twice the
epsilon.

Not covered: a sampler that shuffles epochs; a batch size or number of steps chosen by looking at the data; runs that
were not charged (a hyperparameter search is the sum of its runs); anything published besides the noised sums. Under
add-or-remove the number of examples is itself private, and sampling_prob is assumed to be public.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import stats

from dito_jax.errors import UserError
from dito_jax.privacy.central_limit import mean_loss, noise_guess, steps_guess


Adjacency = Literal["add-or-remove", "zero-out"]
RELATIONS: dict[Adjacency, dp_accounting.NeighboringRelation] = {
    "add-or-remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero-out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
}
HIGHEST_EPSILON = 100.0  # largest epsilon for calibration: a larger one gives no protection and takes long to compute
BEYOND_COUNTING = 3000.0  # total mean privacy loss above which epsilon is inf: the distributions would be too large
MOST_STEPS = 10**6  # upper limit of remaining_steps


@dataclasses.dataclass(frozen=True, order=True)
class Release:
    """The release of one step: a noised sum over Poisson-subsampled units.

    Raises:
      UserError: a value is out of range.
    """

    sampling_prob: float
    noise_multiplier: float  # standard deviation of the noise in units of the clipping norm
    num_examples: int | None = None  # number of units in the data set; only with max_batch
    max_batch: int | None = None  # if more units are drawn, a random subset of this size is kept (truncation)

    def __post_init__(self):
        _within("sampling_prob", self.sampling_prob, 0 < self.sampling_prob <= 1, "above 0 and at most 1")
        noise = self.noise_multiplier
        _within("noise_multiplier", noise, 0 < noise < math.inf, "above 0: without noise there is no privacy")
        if (self.max_batch is None) != (self.num_examples is None):
            raise UserError(
                f"max_batch is {self.max_batch}, num_examples {self.num_examples}: a truncated batch needs both, "
                "other batches need neither."
            )
        _at_least_one("max_batch", self.max_batch)
        _at_least_one("num_examples", self.num_examples)

    @property
    def adjacency(self) -> Adjacency:
        """The neighbouring relation of the analysis of one such step."""
        return "add-or-remove" if self.max_batch is None else "zero-out"

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The release as a DpEvent, for any accountant of dp-accounting."""
        if self.max_batch is None:
            return dp_accounting.PoissonSampledDpEvent(
                sampling_probability=self.sampling_prob,
                event=dp_accounting.GaussianDpEvent(noise_multiplier=self.noise_multiplier),
            )
        assert self.num_examples is not None
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.num_examples,
            sampling_probability=self.sampling_prob,
            truncated_batch_size=self.max_batch,
            noise_multiplier=self.noise_multiplier,
        )


Spent = Mapping[Release, int] | Iterable[tuple[Release, int]]


def merged(*spent: Spent) -> dict[Release, int]:
    """Sums the numbers of steps by release; releases with 0 steps are left out.

    Raises:
      UserError: a number of steps is negative.
    """
    total: dict[Release, int] = {}
    for part in spent:
        for release, steps in part.items() if isinstance(part, Mapping) else part:  # pyright: ignore
            _within("steps", steps, steps >= 0 and steps == int(steps), "a whole number, 0 or more")
            if steps:
                total[release] = total.get(release, 0) + int(steps)  # pyright: ignore
    return total


def adjacency(spent: Spent) -> Adjacency:
    """The neighbouring relation for which the epsilon of all these releases together holds."""
    return "zero-out" if any(release.max_batch is not None for release in merged(spent)) else "add-or-remove"


def epsilon(spent: Spent, delta: float) -> float:
    """The epsilon at this delta of all releases together; 0.0 for none, inf if it is too large to compute.

    Raises:
      UserError: delta is not between 0 and 1, or a number of steps is negative.
    """
    _check_delta(delta)
    total = merged(spent)
    if not total:
        return 0.0
    if (
        sum(mean_loss(release.sampling_prob, release.noise_multiplier) * steps for release, steps in total.items())
        > BEYOND_COUNTING
    ):
        return math.inf
    # Sorted, so that equal sums are composed in the same order and have a bit-identical epsilon.
    losses = [_loss_of(release, total[release]) for release in sorted(total, key=repr)]
    return float(functools.reduce(lambda one, other: one.compose(other), losses).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=64)
def noise_multiplier(
    num_examples: int, batch_size: int, steps: int, epsilon: float, delta: float, *, max_batch: int | None = None
) -> float:
    """Calibration: the smallest noise multiplier with which `steps` steps stay within (epsilon, delta).

    Each unit is drawn with probability q = batch_size / num_examples, so batch_size is the expected batch size; at most
    `max_batch` of the drawn units are kept. The result is rounded up to six digits, so its epsilon is never exceeded.

    Raises:
      UserError: a value is out of range, or epsilon is above 100.
    """
    for name, value in {"num_examples": num_examples, "batch_size": batch_size, "steps": steps}.items():
        _at_least_one(name, value)
    _within("batch_size", batch_size, batch_size <= num_examples, f"at most num_examples = {num_examples}")
    _check_budget(epsilon, delta)
    q, units = batch_size / num_examples, None if max_batch is None else num_examples

    def spent(sigma: float) -> dict[Release, int]:
        return {Release(q, sigma, units, max_batch): steps}

    def fits(sigma: float) -> bool:
        return _epsilon(spent(sigma), delta) <= epsilon

    if units is None:
        sigma = _calibrated(spent, noise_guess(q, steps, epsilon, delta), epsilon, delta)
    else:  # rare truncation does not change six digits, and its accounting takes long: try without it first
        sigma = noise_multiplier(num_examples, batch_size, steps, epsilon, delta)
        if fits(sigma * (1 - 1e-5)) or not fits(sigma * (1 + 1e-5)):
            sigma = _calibrated(spent, sigma, epsilon, delta)
    exponent = math.floor(math.log10(sigma)) - 5
    digits = math.ceil(sigma / 10.0**exponent)
    while not fits(rounded := float(f"{digits}e{exponent}")):
        digits += 1
    return rounded


def _calibrated(spent: Callable[[float], dict[Release, int]], guess: float, epsilon: float, delta: float) -> float:
    """The sigma for which the epsilon of `spent(sigma)` is the given one, or slightly less."""
    low = high = guess
    while _epsilon(spent(low), delta) <= epsilon:
        low /= 1.2
    while _epsilon(spent(high), delta) > epsilon:
        high *= 1.2
    return dp_accounting.calibrate_dp_mechanism(
        make_fresh_accountant=functools.partial(
            dp_accounting.pld.PLDAccountant, neighboring_relation=RELATIONS[adjacency(spent(high))]
        ),
        make_event_from_param=lambda sigma: dp_accounting.ComposedDpEvent(
            events=[
                dp_accounting.SelfComposedDpEvent(event=release.event, count=steps)
                for release, steps in spent(sigma).items()
            ]
        ),
        target_epsilon=epsilon,
        target_delta=delta,
        bracket_interval=dp_accounting.ExplicitBracketInterval(low, high),
        tol=3e-6 * high,
    )


def remaining_steps(spent: Spent, release: Release, epsilon: float, delta: float) -> int:
    """The largest number of further steps with this release within the budget (epsilon, delta); at most a million.

    Raises:
      UserError: the budget is out of range, or a number of steps is negative.
    """
    _check_budget(epsilon, delta, highest=math.inf)
    before = merged(spent)
    known: dict[int, float] = {}

    def excess(steps: int) -> float:
        if steps not in known:
            known[steps] = _epsilon(merged(before, {release: steps}), delta) - epsilon
        return known[steps]

    if excess(1) > 0:
        return 0
    guess = steps_guess(release.sampling_prob, release.noise_multiplier, min(epsilon, HIGHEST_EPSILON), delta)
    low, high = 1, int(min(MOST_STEPS, max(2, guess)))
    while excess(high) <= 0:
        if high == MOST_STEPS:
            return MOST_STEPS
        low, high = high, min(MOST_STEPS, 2 * high)
    turn = 0
    while high - low > 1:
        turn += 1
        middle = (low + high) // 2
        if turn % 3 and math.isfinite(excess(high)):  # interpolate in epsilon^2, which is about linear in the steps
            below, above = ((known[at] + epsilon) ** 2 - epsilon**2 for at in (low, high))
            middle = min(max(low + int((high - low) * -below / (above - below)), low + 1), high - 1)
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return low


def truncation(num_examples: int, sampling_prob: float, *, steps: int, delta: float, multiple: int = 1) -> int:
    """The smallest max_batch, a multiple of `multiple`, for which truncation has probability below delta/100.

    The probability is the one that the analysis of truncation charges: that enough other units are drawn to fill the
    batch, P(Binomial(n - 1, q) >= size), times the number of steps.

    Raises:
      UserError: a value is out of range.
    """
    for name, value in {"num_examples": num_examples, "steps": steps, "multiple": multiple}.items():
        _at_least_one(name, value)
    _within("sampling_prob", sampling_prob, 0 < sampling_prob <= 1, "above 0 and at most 1")
    _check_delta(delta)

    def risk(pieces: int) -> float:
        return steps * float(stats.binom.sf(pieces * multiple - 1, num_examples - 1, sampling_prob))

    low, high = 0, -(-num_examples // multiple)  # a batch with room for all units is never truncated
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if risk(middle) < delta / 100 else (middle, high)
    return high * multiple


@functools.lru_cache(maxsize=16)
def _loss(release: Release) -> pld.PrivacyLossDistribution:
    """The privacy loss distribution of one step."""
    if release.max_batch is None:
        return pld.from_gaussian_mechanism(
            standard_deviation=release.noise_multiplier,
            sampling_prob=release.sampling_prob,
            neighboring_relation=RELATIONS["add-or-remove"],
        )
    assert release.num_examples is not None
    return pld.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=release.num_examples,
        sampling_probability=release.sampling_prob,
        truncated_batch_size=release.max_batch,
        noise_multiplier=release.noise_multiplier,
        neighboring_relation=RELATIONS["zero-out"],
    )


@functools.lru_cache(maxsize=8)
def _loss_of(release: Release, steps: int) -> pld.PrivacyLossDistribution:
    return _loss(release).self_compose(num_times=steps)


def _check_budget(epsilon: float, delta: float, highest: float = HIGHEST_EPSILON) -> None:
    _within("epsilon", epsilon, 0 < epsilon <= highest, f"above 0 and at most {highest:g}")
    _check_delta(delta)


def _check_delta(delta: float) -> None:
    _within("delta", delta, 0 < delta < 1, "above 0 and below 1, far below 1/number of examples")


def _at_least_one(name: str, value: int | None) -> None:
    whole = value is None or (value >= 1 and value == int(value))
    _within(name, value, whole, "a whole number, 1 or more")


def _within(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}; wanted {wanted}.")


_epsilon = epsilon  # for functions that have a parameter `epsilon`
