"""Initial guesses of noise and steps by the central limit theorem of Gaussian DP, as start values of a search.

Guarantees: none. The limit may underestimate epsilon; the accountant (accounting.py) checks every result. In the limit,
T steps with sampling probability q and noise sigma distinguish two neighbouring data sets as well as one sample from
N(mu, 1) or N(0, 1), with mu = q sqrt(T (exp(1/sigma^2) - 1)) (arXiv:1911.11607, corollary 2).
"""

import math

from scipy import optimize, special


def noise_guess(sampling_prob: float, steps: int, epsilon: float, delta: float) -> float:
    """Approximate noise multiplier sigma for (epsilon, delta)."""
    return 1 / math.sqrt(math.log1p((_drift(epsilon, delta) / sampling_prob) ** 2 / steps))


def steps_guess(sampling_prob: float, noise_multiplier: float, epsilon: float, delta: float) -> float:
    """Approximate number of steps T for (epsilon, delta)."""
    return (_drift(epsilon, delta) / sampling_prob) ** 2 / math.expm1(min(noise_multiplier**-2, 700))


def mean_loss(sampling_prob: float, noise_multiplier: float) -> float:
    """Upper bound of one step's mean privacy loss: log(1 + q^2 (exp(1/sigma^2) - 1)), by the chi-squared distance.

    This is a true bound, not a limit: the Kullback-Leibler divergence is at most log(1 + chi-squared).
    """
    x, q = noise_multiplier**-2, sampling_prob
    return x + 2 * math.log(q) if x > 700 else math.log1p(q * q * math.expm1(x))


def _drift(epsilon: float, delta: float) -> float:
    """The mu for which N(mu, 1) versus N(0, 1) is (epsilon, delta)-DP (arXiv:1905.02383, corollary 1)."""

    def excess(mu: float) -> float:
        miss, hit = (float(special.log_ndtr(-epsilon / mu + sign * mu / 2)) for sign in (-1, 1))
        return math.exp(hit) - math.exp(min(epsilon + miss, 700)) - delta

    return float(optimize.brentq(excess, 1e-12, 1e3))  # pyright: ignore[reportArgumentType]
