"""An audit of the code that makes a run's steps private: its own clipping and noise, and three bugs planted in it.

Gradient canaries (canaries.py) go through the clipped sum of the run's backend and through its noise. The claim is that
of a few steps in which every canary takes part, at the run's sigma or SIGMA, whichever is more: under little noise the
claim is weaker than anything that NUM canaries can prove. Controls are the same code with noise off, with clipping off,
and with the same noise in both steps. Each must be refuted: an audit that lets one pass would have let the run's code
pass with that bug.

Guarantees: what canaries.py says of `audit_mechanism`. No data are looked at, and nothing is charged.

Cannot show: that a run called this code, or drew its batches as it says; example canaries see that, with less power.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.linear import linear
from dito_jax.privacy.accounting import Release, epsilon
from dito_jax.privacy.canaries import EpsilonBounds, PrivateSum, audit_mechanism, verdict
from dito_jax.privacy.clipping import ClippedSum
from dito_jax.privacy.noise import add_noise
from dito_jax.privacy.settings import PrivacyConfig


SIGMA = 2.0
NUM, DIMENSION = 1200, 1500


@dataclasses.dataclass(frozen=True)
class Check:
    """What the canaries prove of one mechanism, beside the epsilon that a sound one has."""

    claimed_epsilon: float
    bounds: EpsilonBounds
    verdict: str
    wanted: str

    @property
    def passed(self) -> bool:
        return self.verdict == self.wanted


class _Product(nnx.Module):
    """Its output for a vector is <kernel, vector>: the output's gradient is the vector."""

    def __init__(self):
        self.product = linear(DIMENSION, 1, "D .", bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x: Float[Array, "B 1 D"]) -> Float[Array, " B"]:
        return self.product(x)[:, 0, 0]


def check_mechanism(
    privacy: PrivacyConfig, noise_multiplier: float, *, narrow: bool, seed: int = 0
) -> dict[str, Check]:
    """The run's code as it is, for one step and for two, and with each bug. `narrow`: the run computes in bfloat16."""
    sigma = max(noise_multiplier, SIGMA)
    graph, params = nnx.split(_Product(), nnx.Param)
    losses: Callable[[Any, dict[str, Array]], Array] = lambda network, rows: network(rows["vector"])
    sound = ClippedSum(graph, losses, privacy.clip_norm, privacy.backend, privacy.microbatch, narrow=narrow)
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
    return {
        name: _checked(private_sum, steps, wanted, sigma, privacy.delta, seed)
        for name, (private_sum, steps, wanted) in sides.items()
    }


def _checked(private_sum: PrivateSum, steps: int, wanted: str, sigma: float, delta: float, seed: int) -> Check:
    bounds = audit_mechanism(
        private_sum, dimension=DIMENSION, num_canaries=NUM, steps=steps, key=jax.random.key(seed), delta=delta,
        alternate=steps > 1,
    )  # fmt: skip
    claimed = epsilon({Release(1.0, sigma): steps}, delta)
    return Check(claimed, bounds, verdict(bounds, claimed), wanted)
