"""First guesses of noise and steps, by the central limit theorem of privacy loss: where a search begins.

Guarantees: none. The limit may understate; whatever is found from here is accounted exactly before it is believed
(accounting.py). In the limit, T steps that draw with probability q under noise sigma tell two neighbours apart as well
as one look at N(mu, 1) or N(0, 1) does, with mu = q sqrt(T (exp(1/sigma^2) - 1)) (arXiv:1911.11607, corollary 2).
"""

import math

from scipy import optimize, special


def noise_guess(sampling_prob: float, steps: int, epsilon: float, delta: float) -> float:
    """sigma for (epsilon, delta)."""
    return 1 / math.sqrt(math.log1p((_drift(epsilon, delta) / sampling_prob) ** 2 / steps))


def steps_guess(sampling_prob: float, noise_multiplier: float, epsilon: float, delta: float) -> float:
    """T for (epsilon, delta)."""
    return (_drift(epsilon, delta) / sampling_prob) ** 2 / math.expm1(min(noise_multiplier**-2, 700))


def mean_loss(sampling_prob: float, noise_multiplier: float) -> float:
    """An upper bound of one step's mean privacy loss: log(1 + q^2 (exp(1/sigma^2) - 1)), by the chi-squared distance.

    Unlike the above it is no limit: Kullback-Leibler divergence is at most log(1 + chi-squared).
    """
    x, q = noise_multiplier**-2, sampling_prob
    return x + 2 * math.log(q) if x > 700 else math.log1p(q * q * math.expm1(x))


def _drift(epsilon: float, delta: float) -> float:
    """The mu at which N(mu, 1) against N(0, 1) is (epsilon, delta)-private (arXiv:1905.02383, corollary 1)."""

    def excess(mu: float) -> float:
        miss, hit = (float(special.log_ndtr(-epsilon / mu + sign * mu / 2)) for sign in (-1, 1))
        return math.exp(hit) - math.exp(min(epsilon + miss, 700)) - delta

    return float(optimize.brentq(excess, 1e-12, 1e3))  # pyright: ignore[reportArgumentType]
