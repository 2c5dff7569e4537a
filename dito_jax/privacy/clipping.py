"""The clipped sum: what private training takes from its examples, and all that it takes.

    sum over examples i of min(1, C / |g_i|) g_i,    g_i = d loss_i / d params,    |g_i| over all trainable parameters

Four backends give the same sum and differ in memory and time (B examples, P parameters):

    vmap          all g_i at once: B P numbers. jax-privacy's, the oracle
    microbatch    a few g_i at a time; its speed where one example fills the device
    ghost         norms in one pass, the clipped sum in a second: twice the time, no more memory than training
    bookkeeping   one pass: norms, and inputs and output gradients of every layer, of which the sum is then made

Guarantees
  - The sum changes by at most `sensitivity(relation)` in L2 norm when one example is added or removed, up to float32's
    rounding, whatever the network computes in: what is summed is what was measured. Where it computes in bfloat16 the
    threshold is lower by `MARGINS`: tensor cores measure norms a little short, and `ghost` rounds anew in its second
    pass, by an estimate.
  - An example whose gradient is not finite counts as zero (by `vmap` and `microbatch`, those of its numbers that are
    not), and so does padding, whatever is in it.
  - Padding is computed like an example: no loop or branch depends on which examples it is, or how many.
  - Assumes that loss_i depends on example i alone. The rounding itself may tell of an example
    (https://arxiv.org/abs/2112.05307): that is not covered.

Sources: DP-SGD, https://arxiv.org/abs/1607.00133; ghost clipping, https://arxiv.org/abs/2110.05679; book-keeping,
https://arxiv.org/abs/2210.00038.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import jax_privacy
from flax import nnx
from jaxtyping import Array, Bool, Float

from dito_jax.privacy.ghost_clipping import Trainable, tapped
from dito_jax.privacy.settings import Backend
from dito_jax.sharding import axis_size, one_example


Examples = dict[str, Array]  # each (B, draws, ...); "weight" (B, draws): what a draw counts in its example's loss
# Two passes of a network in bfloat16 differ by some sqrt(depth) 2^-9, 1 % at a depth of 28; 0.15 % was seen at 2.
# Accumulators of tensor cores cut what they add: an H100's norms were short by up to 1.8e-5, at 9,216 columns.
MARGINS = {"ghost": 0.02, "bookkeeping": 1e-4}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Told:
    """What the clipping saw of B examples: private, not to be released."""

    norm: Any  # float32 (B,)
    loss: Any  # float32 (B,)


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """The clipped sum of a network's gradients: `(params, examples, padding) -> (sum, Told)`.

    `losses(network, rows)` gives the loss of each row, rows being the draws of all examples one after the other;
    `cast` makes of parameters those that the network computes with. Sums are float32.
    """

    graph: nnx.GraphDef  # of a model whose other parameters are `frozen`
    losses: Callable[[Any, Examples], Float[Array, " rows"]]
    clip_norm: float
    backend: Backend = "bookkeeping"
    microbatch: int = 1  # examples at a time on a device, of the backend of that name
    cast: Callable[[nnx.State], nnx.State] = lambda params: params
    narrow: bool = False  # whether the network computes in less than float32

    def sensitivity(
        self, relation: dp_accounting.NeighboringRelation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    ) -> float:
        """How far one example can move the sum, in L2 norm: C if it comes, goes, or becomes zero; 2 C if replaced."""
        return self.clip_norm * (2 if relation == dp_accounting.NeighboringRelation.REPLACE_ONE else 1)

    def __call__(
        self, params: nnx.State, examples: Examples, padding: Bool[Array, " B"], frozen: nnx.State | None = None
    ) -> tuple[nnx.State, Told]:
        frozen = nnx.State({}) if frozen is None else frozen
        return BACKENDS[self.backend](self, params, frozen, examples, padding)

    def example_losses(self, network: nnx.Module, examples: Examples) -> Float[Array, " B"]:
        """The weighted sum of each example's draws."""
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
        weight = examples["weight"]
        return jnp.sum(weight * self.losses(network, rows).reshape(weight.shape), axis=1)

    def factor(self, norm: Float[Array, " B"], padding: Bool[Array, " B"]) -> Float[Array, " B"]:
        """What each gradient is multiplied by."""
        most = self.clip_norm * (1 - MARGINS.get(self.backend, 0.0) if self.narrow else 1)
        return jnp.where(jnp.isfinite(norm) & ~padding, jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30)), 0.0)


def _one_by_one(problem: ClippedSum, params, frozen, examples, padding, at_a_time: int | None):
    axes: Any = tuple(axis for axis in ("data", "fsdp") if axis_size(axis) > 1)
    size = at_a_time and min(at_a_time * math.prod(map(axis_size, axes)), padding.size)

    def loss(params, one, padding):
        with one_example():
            network = nnx.merge(problem.graph, problem.cast(nnx.merge_state(params, frozen)))
            return jnp.sum(jnp.where(padding, 0.0, problem.example_losses(network, one)))

    # Told which examples are padding, jax-privacy would leave out the last of them, and time would tell how many.
    # So they are computed, and their gradient is zero, or zero times what is not finite, which nan_safe makes zero.
    clipped = jax_privacy.clipped_grad(
        loss, l2_clip_norm=problem.clip_norm, batch_argnums=(1, 2), return_values=True, return_grad_norms=True,
        microbatch_size=size, nan_safe=True, dtype=jnp.float32, spmd_axis_name=axes or None,
    )  # fmt: skip
    total, told = clipped(params, examples, padding)
    return total, Told(told.grad_norms, told.values)


def _vmap(problem, params, frozen, examples, padding):
    return _one_by_one(problem, params, frozen, examples, padding, None)


def _microbatch(problem, params, frozen, examples, padding):
    return _one_by_one(problem, params, frozen, examples, padding, problem.microbatch)


def _observe(problem: ClippedSum, params, frozen, examples, padding, *, keep: bool):
    """The taps of a backward pass, what was seen by them, and of the examples."""
    whole = problem.cast(nnx.merge_state(params, frozen))
    paths = {path for path, _ in nnx.to_flat_state(params)}
    trainable: Trainable = lambda path, _: path in paths
    losses = lambda network: problem.example_losses(network, examples)
    taps = tapped(problem.graph, whole, trainable, losses, padding.size, keep=keep)
    loss, pull = jax.vjp(lambda zeros: losses(nnx.merge(taps.graph, whole, zeros)), taps.taps)
    (seen,) = pull(jnp.where(padding, 0.0, 1.0))
    return taps, seen, Told(jnp.sqrt(taps.norm_sq(seen)), loss)


def _ghost(problem: ClippedSum, params, frozen, examples, padding):
    *_, told = _observe(problem, params, frozen, examples, padding, keep=False)
    factor = problem.factor(told.norm, padding)
    # What counts as zero is taken out before the second pass: there zero times NaN would be NaN.
    counts = lambda a: jnp.where((factor == 0).reshape(-1, *[1] * (a.ndim - 1)), 0, a)
    examples = jax.tree.map(counts, examples)

    def clipped(params):
        network = nnx.merge(problem.graph, problem.cast(nnx.merge_state(params, frozen)))
        return jnp.sum(factor * problem.example_losses(network, examples))

    return jax.grad(clipped)(params), told


def _bookkeeping(problem: ClippedSum, params, frozen, examples, padding):
    taps, seen, told = _observe(problem, params, frozen, examples, padding, keep=True)
    return taps.gradient(seen, problem.factor(told.norm, padding), params), told


BACKENDS: dict[str, Callable[..., tuple[nnx.State, Told]]] = {
    "vmap": _vmap,
    "microbatch": _microbatch,
    "ghost": _ghost,
    "bookkeeping": _bookkeeping,
}
