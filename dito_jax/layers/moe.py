"""Mixture-of-experts (MoE) layer: a router, SwiGLU experts and an optional shared expert."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn.initializers import normal, variance_scaling
from jaxtyping import Array, Float, Int

from dito_jax.layers.expert_parallel import AXIS, EXCHANGES, ExchangeName, default_exchange, local
from dito_jax.layers.gradient_hooks import with_hook
from dito_jax.layers.mlp import SwiGLU
from dito_jax.sharding import axis_size, batch_pieces, on_mesh
from kernels_pallas import Assignments, Load, backend, combine, dispatch, expert_load, grouped_matmul


# (logits (T, E), bias (E,) or None, expert index (T,) or None) of one pool -> the assignments of tokens to experts
Choose = Callable[[jax.Array, jax.Array | None, jax.Array | None], Assignments]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterReport:
    """Statistics of the router for each of P pools; sums over P are those of the global batch."""

    load: Load  # with a leading dimension P
    dropped: Any  # int32 (P,): rows dropped because their expert was at capacity


class RouterBias(nnx.Param):
    """Bias added to the router scores when choosing experts; it has no gradient, `update_bias` moves it by the load."""


class MoE(nnx.Module):
    """y = sum over a token's experts of weight * expert(x), plus shared_expert(x) if there is one; all are SwiGLU.

    The tokens of `pool` images are routed together: expert choice selects from the tokens of a pool, and capacities
    count its rows. With pool = 1 the result for an image does not depend on other images. A pool lies on one device, so
    results do not depend on the mesh.

    The router computes in float32 in any compute dtype: its weights are marked `float32` and are not cast.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        choose: Choose,
        scores: Callable[[jax.Array], jax.Array],
        active: int,
        even: bool = False,
        by_index: bool = False,
        biased: bool = False,
        capacity_factor: float | None = None,
        pool: int = 1,
        shared_hidden: int = 0,
        exchange: ExchangeName | None = None,
        rngs: nnx.Rngs,
    ):
        """`active` is the average number of experts per token; `even` means that all experts get equally many rows.

        `scores` computes the probabilities for the load statistics. `capacity_factor` limits an expert's rows in a pool
        to this multiple of the even share and drops the rest. `biased` adds a RouterBias. `by_index` means that the
        caller gives each image's expert; the router then has no parameters and its logits are zero.
        """
        self.choose, self.scores, self.active, self.even = choose, scores, active, even
        self.capacity_factor, self.pool, self.exchange = capacity_factor, pool, exchange
        matrix = variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)  # Xavier initialization of each expert
        param = lambda init, shape, **metadata: nnx.Param(init(rngs.params(), shape, jnp.float32), **metadata)
        router = None if by_index else param(normal(0.02), (width, num_experts), dims="D .", float32=True)
        self.router_kernel = router
        self.bias = RouterBias(jnp.zeros(num_experts), dims=".", float32=True) if biased else None
        gate_up = matrix(rngs.params(), (num_experts, width, 2 * hidden), jnp.float32)
        self.gate_up_kernel = nnx.Param(gate_up.reshape(num_experts, width, 2, hidden), dims="E D . F")
        self.down_kernel = param(matrix, (num_experts, hidden, width), dims="E F D")
        self.shared = SwiGLU(width, shared_hidden, rngs=rngs) if shared_hidden else None

    def __call__(
        self, x: Float[Array, "B T D"], index: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterReport]:
        """Returns the output and the router's statistics; `index` is each image's expert for a router `by_index`.

        Raises:
          ValueError: the batch on each device is not a multiple of the pool.
        """
        assignments, report = self._route(x, index)
        hooked = getattr(self, "gate_up_kernel_hook", None) is not None
        y = self._compute_with_hooks(x, assignments) if hooked else self._compute(x, assignments)
        return (y if self.shared is None else y + self.shared(x)), report

    def _route(self, x, index) -> tuple[Assignments, RouterReport]:
        """Assignments of each pool, computed on the device that holds its images."""
        (B, T, _), E = x.shape, self.down_kernel.shape[0]
        pieces = batch_pieces(jax.sharding.get_abstract_mesh().shape)
        if B % (pieces * self.pool):
            raise ValueError(
                f"MoE: the batch of {B} images, split over {pieces} device(s), is not a multiple of the pool of "
                f"{self.pool} images on each; change the batch size or model.pool."
            )
        logits = jnp.zeros((B, T, E))
        if self.router_kernel is not None:
            x32 = x.astype(jnp.float32)
            logits = jnp.dot(x32, self.router_kernel[...], precision=lax.Precision.HIGHEST)
            logits = with_hook(self, "router_kernel", x32, logits)
        logits = logits.reshape(B // self.pool, self.pool * T, E)
        index = None if index is None else jnp.repeat(index, T).reshape(logits.shape[:2])
        bias = None if self.bias is None else self.bias[...]

        def of_pool(logits, bias, index):
            assignments, dropped = self.choose(logits, bias, index), jnp.zeros((), jnp.int32)
            load = expert_load(assignments, self.scores(logits), logits)
            if not self.even and self.capacity_factor is not None:
                assignments, dropped = assignments.within(self._capacity(assignments))
            return assignments, RouterReport(load, dropped)

        # Without on_mesh XLA would all-gather the logits in order to sort them.
        of_pools = on_mesh(jax.vmap(of_pool, in_axes=(0, None, 0)), ("B . .", ".", "B ."), ("B", "B"))
        return of_pools(logits, bias, index)

    def _capacity(self, assignments: Assignments) -> int:
        """Maximum rows of an expert from one pool; without a limit one row per token."""
        factor = 1 if self.even else self.capacity_factor
        if factor is None:
            return assignments.num_tokens
        return math.ceil(factor * assignments.token.shape[-1] / assignments.num_experts)

    def _compute(self, x, assignments: Assignments):
        devices = axis_size(AXIS)
        name = self.exchange or default_exchange(
            self.active, devices, even=self.even, gpu=backend.target().platform == "gpu"
        )
        exchange = local if devices == 1 else EXCHANGES[name]
        capacity = self._capacity(assignments)

        def on_one_device(x, assignments, gate_up, down):
            pools = assignments.token.shape[0]
            y = exchange(
                x.reshape(-1, x.shape[-1]), assignments.joined(), gate_up.reshape(*gate_up.shape[:2], -1), down,
                capacity=pools * capacity,
            )  # fmt: skip
            return (lax.psum(y, "tensor") if axis_size("tensor") > 1 else y).reshape(x.shape)

        run = on_mesh(on_one_device, ("B T .", "B .", "E . . F", "E F ."), "B T .")
        return run(x, assignments, self.gate_up_kernel[...], self.down_kernel[...])

    def _compute_with_hooks(self, x, assignments: Assignments):
        """The same computation as separate products with gradient hooks, for private training.

        Each device computes the rows of its own images with all experts: the expert weights are all-gathered, as FSDP
        gathers parameters.
        """
        if self.pool > 1:
            raise ValueError(
                f"MoE: private training needs model.pool 1, so that images are independent; got {self.pool}."
            )
        expert = assignments.expert
        groups = jnp.where(expert < assignments.num_experts, expert, -1)
        rows = on_mesh(_rows, ("B T .", "B ."), "B . .")(x, assignments)
        both = on_mesh(_of_experts, ("B . .", "B .", ". . F"), "B . F")  # gate and up separately: F is sharded
        up = [both(rows, assignments, self.gate_up_kernel[...][:, :, i]) for i in range(2)]
        up = with_hook(self, "gate_up_kernel", rows, jnp.stack(up, axis=2), groups=groups)
        h = jax.nn.silu(up[:, :, 0]) * up[:, :, 1]

        def down(h, assignments, kernel):
            y = _of_experts(h, assignments, kernel)
            return lax.psum(y, "tensor") if axis_size("tensor") > 1 else y

        y = on_mesh(down, ("B . F", "B .", ". F ."), "B . .")(h, assignments, self.down_kernel[...])
        y = with_hook(self, "down_kernel", h, y, groups=groups)
        return on_mesh(functools.partial(_combined, num_tokens=x.shape[1]), ("B . .", "B ."), "B T .")(y, assignments)


def _rows(x: Float[Array, "B T D"], assignments: Assignments) -> Float[Array, "B n D"]:
    """The token row of each assignment, in the order of the assignments."""
    order = jnp.argsort(assignments.joined().expert, stable=True)
    rows = dispatch(x.reshape(-1, x.shape[-1]), assignments.joined().route())
    return _back(rows, order).reshape(x.shape[0], -1, x.shape[-1])


def _of_experts(rows: Float[Array, "B n D"], assignments: Assignments, kernel: Float[Array, "E D F"]):
    """rows[b, i] @ kernel[expert of (b, i)]."""
    flat = assignments.joined()
    order = jnp.argsort(flat.expert, stable=True)
    out = grouped_matmul(_taken(rows.reshape(-1, rows.shape[-1]), order), kernel, flat.rows_of_experts())
    return _back(out, order).reshape(*rows.shape[:2], -1)


def _combined(rows: Float[Array, "B n D"], assignments: Assignments, *, num_tokens: int) -> Float[Array, "B T D"]:
    """The weighted sum of each token's rows."""
    flat = assignments.joined()
    order = jnp.argsort(flat.expert, stable=True)
    y = combine(_taken(rows.reshape(-1, rows.shape[-1]), order), flat.route())
    return y.reshape(rows.shape[0], num_tokens, -1)


def _taken(rows, order):
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _back(rows, order):
    """The inverse of `_taken`."""
    return _taken(rows, jnp.argsort(order))
