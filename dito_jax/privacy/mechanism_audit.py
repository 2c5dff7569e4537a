"""Mechanism audit: an empirical audit of the clipping and noise code of a run, with three planted bugs as controls.

Gradient canaries (canaries.py) go through the run's clipping backend and its noise. The claimed epsilon is that of one
or two steps in which every canary takes part, with the run's sigma or SIGMA, whichever is larger, because with little
noise the claimed epsilon is larger than any bound that NUM canaries can prove. The controls are the same code with
noise off, with clipping off, and with the same noise in both steps. Each control must be refuted; otherwise the audit
would not have detected that bug in the run's code either.

A further check measures how far one of NUM equal examples moves their sum, in the run's compute dtype; its bound is
the epsilon of a move of that length. Equal examples have the longest sum, so rounding that grows with the sum shows.

Guarantees: those of `canaries.audit_mechanism`. The audit uses no data and charges nothing.

Cannot show: that a run called this code, or sampled its batches as stated; example canaries test that, with less power.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.linear import linear
from dito_jax.privacy.accounting import Release, epsilon
from dito_jax.privacy.canaries import EpsilonBounds, PrivateSum, audit_mechanism, verdict
from dito_jax.privacy.clipping import ClippedSum
from dito_jax.privacy.noise import add_noise
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.training.step import ComputeDtype, cast


SIGMA = 2.0
NUM, DIMENSION = 1200, 1500
ROUNDING = 1e-4  # a move of this much more than the clipping norm is rounding in float32


@dataclasses.dataclass(frozen=True)
class Check:
    """Result for one mechanism: the claimed epsilon, the lower bounds, the verdict and the expected verdict."""

    claimed_epsilon: float
    bounds: EpsilonBounds
    verdict: str
    wanted: str

    @property
    def passed(self) -> bool:
        return self.verdict == self.wanted


class _Product(nnx.Module):
    """A module with output <kernel, vector>, so that the gradient of the output is the vector."""

    def __init__(self):
        self.product = linear(DIMENSION, 1, "D .", bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x: Float[Array, "B 1 D"]) -> Float[Array, " B"]:
        return self.product(x)[:, 0, 0]


def check_mechanism(
    privacy: PrivacyConfig, noise_multiplier: float, *, compute_dtype: ComputeDtype, seed: int = 0
) -> dict[str, Check]:
    """Audits the run's code for one and two steps, and with each bug."""
    narrow = compute_dtype != "float32"
    sigma = max(noise_multiplier, SIGMA)
    graph, params = nnx.split(_Product(), nnx.Param)
    losses: Callable[[Any, dict[str, Array]], Array] = lambda network, rows: network(rows["vector"])
    sound = ClippedSum(
        graph, losses, privacy.clip_norm, privacy.backend, math.gcd(privacy.microbatch, NUM),
        functools.partial(cast, dtype=compute_dtype), narrow=narrow,
    )  # fmt: skip
    loose = dataclasses.replace(sound, clip_norm=1e9)
    noise = sigma * sound.sensitivity()
    same = jax.random.key(seed)

    def mechanism(clipped_sum: ClippedSum, stddev: float, key_of=lambda key: key) -> PrivateSum:
        @jax.jit
        def private_sum(vectors, present, key):
            examples = {"vector": vectors[:, None, None, :], "weight": jnp.ones((len(vectors), 1))}
            total, _ = clipped_sum(params, examples, ~present)
            words = jax.random.bits(key_of(key), (8,), jnp.uint32)
            (released,) = jax.tree.leaves(add_noise(total, words, stddev))
            return released[:, 0]

        return private_sum

    sides = {
        "as it is, one step": (mechanism(sound, noise), 1, "not refuted"),
        "as it is, two steps": (mechanism(sound, noise), 2, "not refuted"),
        "noise off": (mechanism(sound, 0.0), 1, "refuted"),
        "clipping off": (mechanism(loose, noise), 1, "refuted"),
        "the same noise twice": (mechanism(sound, noise, lambda _: same), 2, "refuted"),
    }
    checks = {
        name: _checked(private_sum, steps, wanted, sigma, privacy.delta, seed)
        for name, (private_sum, steps, wanted) in sides.items()
    }
    move = largest_move(sound, params, compute_dtype) / sound.clip_norm
    return checks | {f"{NUM:,} equal examples": _of_move(move, sigma, privacy.delta)}


def largest_move(clipped_sum: ClippedSum, params: nnx.State, compute_dtype: ComputeDtype) -> float:
    """How far the sum over NUM equal examples moves, in L2 norm, when one of them is left out."""
    vector = jax.random.normal(jax.random.key(0), (1, 1, 1, DIMENSION)).astype(compute_dtype)
    examples = {"vector": jnp.repeat(vector, NUM, axis=0), "weight": jnp.ones((NUM, 1))}
    run = jax.jit(lambda padding: clipped_sum(params, examples, padding)[0])
    sums = [jax.tree.leaves(run(jnp.arange(NUM) < left_out)) for left_out in (0, 1)]
    return float(np.sqrt(sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in zip(*sums, strict=True))))


def _of_move(move: float, sigma: float, delta: float) -> Check:
    """The exact epsilon of one step in which an example moves the sum by `move` clipping norms, as bounds."""
    exact = epsilon({Release(1.0, sigma / max(1.0, move / (1 + ROUNDING))): 1}, delta)
    auc = 0.5 * (1 + math.erf(move / sigma / 2))
    bounds = EpsilonBounds(exact, exact, exact, auc, num_in=NUM, num_out=1, delta=delta, confidence=1.0)
    claimed = epsilon({Release(1.0, sigma): 1}, delta)
    return Check(claimed, bounds, verdict(bounds, claimed), "not refuted")


def _checked(private_sum: PrivateSum, steps: int, wanted: str, sigma: float, delta: float, seed: int) -> Check:
    bounds = audit_mechanism(
        private_sum, dimension=DIMENSION, num_canaries=NUM, steps=steps, key=jax.random.key(seed), delta=delta,
        alternate=steps > 1,
    )  # fmt: skip
    claimed = epsilon({Release(1.0, sigma): steps}, delta)
    return Check(claimed, bounds, verdict(bounds, claimed), wanted)
