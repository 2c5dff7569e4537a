"""The normal's upper quantile in pieces: x with P(X > x) = q, for q = (1 + (k + t) / 16) 2^-(o+2), 0 <= t < 1.

For each octave o = 0 ... 63 and part k = 0 ... 15 four coefficients c of c0 + c1 t + c2 t^2 + c3 t^3, float32. They lie
in segments.npy, so that all machines have the same to the bit; `computed` is where they come from. The cubic
is within half of float32's last place of the quantile, which goes up to 9.
"""

import functools
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float


OCTAVES, PARTS = 64, 16


@functools.cache
def segments() -> Float[np.ndarray, "1024 4"]:
    """The coefficients, by 16 o + k."""
    return np.load(Path(__file__).with_name("segments.npy"))


def computed() -> Float[np.ndarray, "1024 4"]:
    """The same, made anew: of each segment the cubic through the quantiles at Chebyshev's four nodes."""
    nodes = (np.cos(np.pi * (np.arange(4) + 0.5) / 4) + 1) / 2
    octave, part = np.divmod(np.arange(OCTAVES * PARTS), PARTS)
    tail = (1 + (part[:, None] + nodes) / PARTS) * 2.0 ** -(octave[:, None] + 2)
    return np.linalg.solve(np.vander(nodes, increasing=True), quantile(tail).T).T.astype(np.float32)


def quantile(tail: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """x with P(X > x) = tail <= 1/2, float64, by Newton's method on the logarithm."""
    survival = np.vectorize(lambda x: 0.5 * math.erfc(x / math.sqrt(2)))
    x = np.sqrt(np.maximum(-2 * np.log(2 * tail), 0))
    for _ in range(30):
        now = survival(x)
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        x = x + (np.log(now) - np.log(tail)) * now / density
    return x
