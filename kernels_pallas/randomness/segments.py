"""Piecewise cubic approximation of the normal quantile: x with P(X > x) = q.

For q = (1 + (k + t) / 16) 2^-(o+2) with 0 <= t < 1, each octave o = 0 ... 63 and part k = 0 ... 15 has four float32
coefficients of x = c0 + c1 t + c2 t^2 + c3 t^3. They are stored in segments.npy, so that they are bit-identical on all
machines; `computed` recomputes them. The cubic is within half a unit in the last place of float32 of the quantile,
which is at most 9.
"""

import functools
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float


OCTAVES, PARTS = 64, 16


@functools.cache
def segments() -> Float[np.ndarray, "1024 4"]:
    """The coefficients; row 16 o + k has those of octave o and part k."""
    return np.load(Path(__file__).with_name("segments.npy"))


def computed() -> Float[np.ndarray, "1024 4"]:
    """The coefficients, recomputed: for each segment the cubic through the quantiles at four Chebyshev nodes."""
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
