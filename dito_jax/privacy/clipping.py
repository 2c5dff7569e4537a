"""Per-example gradient clipping for DP-SGD: the sum of the clipped gradients, by four implementations.

    sum over examples i of min(1, C / |g_i|) g_i,    g_i = d loss_i / d params,    |g_i| over all trainable parameters

The four backends compute the same sum and differ in memory and time (B examples, P parameters):

    vmap          all g_i at once: B P numbers. Implemented by jax-privacy; the reference for the others
    microbatch    a few g_i at a time; fast if one example fills the device
    ghost         norms in one pass, the clipped sum in a second: twice the time, little more memory than training
    bookkeeping   one pass that keeps norms, inputs and output gradients of every layer; the sum is computed from these

Guarantees
  - The sum changes by at most `sensitivity(relation)` in L2 norm when one example is added or removed, in any compute
    dtype and for any batch size. `ghost` and `bookkeeping` do not clip by the norm that they measure but by an upper
    bound of it, which includes the rounding of all products of rows, in float32 and on tensor cores, also where terms
    cancel (`kernels_pallas.ghost_norm_sq`). `bookkeeping` sums the gradients that it has bounded, in float32. `ghost`
    computes them again, in a pass that may round differently; MARGINS lowers its threshold for that, by an estimate.
    All thresholds are lowered by 2^-24 for each example of the batch and for the sum over parameters, which is what
    rounding may add to the change of a float32 sum.
  - An example whose gradient is not finite counts as zero (with `vmap` and `microbatch` only the numbers that are not
    finite do). Padding counts as zero, whatever it contains.
  - Padding is computed like an example: no loop or branch depends on which rows are padding, or how many.
  - Assumption: loss_i depends on example i only. Not covered: rounding errors may leak information about an example
    (https://arxiv.org/abs/2112.05307).

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

from dito_jax.privacy.ghost_clipping import Hooks, Trainable, find_hooks
from dito_jax.privacy.settings import Backend
from dito_jax.sharding import axis_size, one_example


Examples = dict[str, Array]  # each (B, draws, ...); "weight" (B, draws): weight of a draw in its example's loss
# Two programs of a bfloat16 network differ by about sqrt(depth) 2^-9: 1 % at depth 28; 0.15 % was measured at depth 2.
# Those of a float32 network differ by 2^-15 of that.
MARGINS = {"ghost": {True: 0.02, False: 1e-6}}  # by backend, and by whether the network is narrow
PARAMETERS = 64  # additions that the squares of one parameter's norm pass through in the sum over layers and parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExampleMetrics:
    """Gradient norm and loss of each of B examples; these are private and must not be released."""

    norm: Any  # float32 (B,); an upper bound that includes rounding with `ghost` and `bookkeeping`
    loss: Any  # float32 (B,)


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """Clipped sum of a network's per-example gradients: `(params, examples, padding) -> (sum, ExampleMetrics)`.

    `losses(network, rows)` returns the loss of each row; the rows are the draws of all examples, one after the other.
    `cast` converts parameters to the compute dtype. Sums are float32.
    """

    graph: nnx.GraphDef  # of the model; parameters that are not trained are passed as `frozen`
    losses: Callable[[Any, Examples], Float[Array, " rows"]]
    clip_norm: float
    backend: Backend = "bookkeeping"
    microbatch: int = 1  # examples at a time on each device; for the backend "microbatch"
    cast: Callable[[nnx.State], nnx.State] = lambda params: params
    narrow: bool = False  # the network computes in a narrower dtype than float32
    batch: int | None = None  # examples in the whole batch, if a call gets a part of it (gradient accumulation)

    def sensitivity(
        self, relation: dp_accounting.NeighboringRelation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    ) -> float:
        """Sensitivity of the sum in L2 norm: C if one example is added, removed or zeroed; 2 C if one is replaced."""
        return self.clip_norm * (2 if relation == dp_accounting.NeighboringRelation.REPLACE_ONE else 1)

    def __call__(
        self, params: nnx.State, examples: Examples, padding: Bool[Array, " B"], frozen: nnx.State | None = None
    ) -> tuple[nnx.State, ExampleMetrics]:
        frozen = nnx.State({}) if frozen is None else frozen
        return BACKENDS[self.backend](self, params, frozen, examples, padding)

    def example_losses(self, network: nnx.Module, examples: Examples) -> Float[Array, " B"]:
        """Loss of each example: the weighted sum over its draws."""
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
        weight = examples["weight"]
        return jnp.sum(weight * self.losses(network, rows).reshape(weight.shape), axis=1)

    def factor(self, norm: Float[Array, " B"], padding: Bool[Array, " B"]) -> Float[Array, " B"]:
        """Clipping factor of each example; 0 for padding and for norms that are not finite."""
        within = jnp.minimum(1.0, self.threshold(padding.size) / jnp.maximum(norm, 1e-30))
        return jnp.where(jnp.isfinite(norm) & ~padding, within, 0.0)

    def threshold(self, examples: int) -> float:
        """The norm to clip to for a call with so many examples: clip_norm less what rounding may add."""
        margin = MARGINS.get(self.backend, {}).get(self.narrow, 0.0)
        return self.clip_norm * (1 - margin - ((self.batch or examples) + PARAMETERS) * 2**-24)


def _one_by_one(problem: ClippedSum, params, frozen, examples, padding, at_a_time: int | None):
    axes: Any = tuple(axis for axis in ("data", "fsdp") if axis_size(axis) > 1)
    size = at_a_time and min(at_a_time * math.prod(map(axis_size, axes)), padding.size)

    def loss(params, one, padding):
        with one_example():
            network = nnx.merge(problem.graph, problem.cast(nnx.merge_state(params, frozen)))
            return jnp.sum(jnp.where(padding, 0.0, problem.example_losses(network, one)))

    # jax-privacy's own padding argument skips the last padded microbatches, so time would reveal the batch size.
    # Padding is therefore computed: its gradient is zero, or 0 * inf, which nan_safe replaces by zero.
    clipped = jax_privacy.clipped_grad(
        loss, l2_clip_norm=problem.threshold(padding.size), batch_argnums=(1, 2), return_values=True,
        return_grad_norms=True, microbatch_size=size, nan_safe=True, dtype=jnp.float32, spmd_axis_name=axes or None,
    )  # fmt: skip
    total, measured = clipped(params, examples, padding)
    return total, ExampleMetrics(measured.grad_norms, measured.values)


def _vmap(problem, params, frozen, examples, padding):
    return _one_by_one(problem, params, frozen, examples, padding, None)


def _microbatch(problem, params, frozen, examples, padding):
    return _one_by_one(problem, params, frozen, examples, padding, problem.microbatch)


def _hooks(problem: ClippedSum, params, frozen, examples, padding) -> tuple[nnx.State, Hooks]:
    """All parameters in the compute dtype, and the hooks of the trained ones."""
    whole = problem.cast(nnx.merge_state(params, frozen))
    paths = {path for path, _ in nnx.to_flat_state(params)}
    trainable: Trainable = lambda path, _: path in paths
    return whole, find_hooks(problem.graph, whole, trainable, problem.example_losses, examples, padding.size)


def _backward(problem: ClippedSum, whole, hooked_graph, hooks, examples, padding):
    """The losses of the examples, and what the hooks return of one backward pass."""
    losses = lambda hooks: problem.example_losses(nnx.merge(hooked_graph, whole, hooks), examples)
    loss, pull = jax.vjp(losses, hooks)
    (hooked,) = pull(jnp.where(padding, 0.0, 1.0))
    return loss, hooked


def _ghost(problem: ClippedSum, params, frozen, examples, padding):
    whole, hooks = _hooks(problem, params, frozen, examples, padding)
    loss, hooked = _backward(problem, whole, *hooks.attached("norms"), examples, padding)
    measured = ExampleMetrics(jnp.sqrt(hooks.norm_sq(hooked)), loss)
    factor = problem.factor(measured.norm, padding)
    _, hooked = _backward(problem, whole, *hooks.attached("sum", factor), examples, padding)
    return hooks.summed(hooked, params), measured


def _bookkeeping(problem: ClippedSum, params, frozen, examples, padding):
    whole, hooks = _hooks(problem, params, frozen, examples, padding)
    loss, hooked = _backward(problem, whole, *hooks.attached("factors"), examples, padding)
    measured = ExampleMetrics(jnp.sqrt(hooks.norm_sq(hooked)), loss)
    return hooks.gradient(hooked, problem.factor(measured.norm, padding), params), measured


BACKENDS: dict[str, Callable[..., tuple[nnx.State, ExampleMetrics]]] = {
    "vmap": _vmap,
    "microbatch": _microbatch,
    "ghost": _ghost,
    "bookkeeping": _bookkeeping,
}
