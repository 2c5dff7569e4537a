"""Clipped sums of the per-example gradients of one parameter, from what its gradient hook returned.

The gradient of y = x W is x^T d_y for each example; the sums here multiply each example by its clipping factor and add
in float32, whatever the dtypes of x and d_y, so that no rounding of the sum depends on how many examples it has.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dito_jax.sharding import on_mesh, summed
from kernels_pallas import clip_reduce, grouped_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HookedGradients:
    """Per-example gradients of one parameter for B examples; fields that were not requested are None."""

    norm_sq: (
        Any  # float32 (B,): bound of each example's squared gradient norm, including a bias trained with the kernel
    )
    inputs: Any = None  # (B, draws, ..., *in): inputs of the product
    outputs: Any = None  # (B, draws, ..., *out): gradients of the outputs
    groups: Any = None  # float32 (B, draws, n): expert of each row, or -1; a float because cotangents are floats
    gradient: Any = None  # float32 (B, ...): the per-example gradients of a small parameter


def product_gradient(
    hooked: HookedGradients, factor: Float[Array, " B"], dims: tuple[str, ...], num_experts: int
) -> Array:
    """Sum over examples of factor times the gradient of a matrix, or of `num_experts` expert matrices; float32.

    An example with factor 0 contributes nothing, even if its gradient is not finite.
    """
    inner = dims if hooked.groups is None else dims[1:]
    num_in = (len(inner) - (hooked.outputs.ndim - hooked.inputs.ndim)) // 2

    def on_device(x, g, groups, factor):
        last = lambda a, n: a.reshape(a.shape[0], -1, math.prod(a.shape[a.ndim - n :]))
        rows, d_rows = last(x, num_in), last(g, len(inner) - num_in)
        shape = (*x.shape[x.ndim - num_in :], *g.shape[g.ndim - (len(inner) - num_in) :])
        if groups is None:
            rows, d_rows = same_dtype(rows, d_rows)
            gradient = clip_reduce(rows, d_rows, factor).reshape(shape)
        else:
            experts = groups.astype(jnp.int32).reshape(rows.shape[:2])
            gradient = _of_experts(rows, d_rows, experts, factor, num_experts).reshape(num_experts, *shape)
        return summed(gradient, dims)

    x_dims, g_dims = (("B", *["."] * middle, *of) for middle, of in _with_middle(hooked, inner, num_in))
    specs = (" ".join(x_dims), " ".join(g_dims), "B", "B")
    return on_mesh(on_device, specs, " ".join(dims))(hooked.inputs, hooked.outputs, hooked.groups, factor)


def bias_gradient(hooked: HookedGradients, factor: Float[Array, " B"], shape: tuple[int, ...]) -> Array:
    """Sum over examples of factor times the gradient of the bias that was added to the outputs; float32."""
    d_y = hooked.outputs.astype(jnp.float32).reshape(factor.size, -1, *shape)
    return weighted_sum(jnp.sum(d_y, axis=1), factor)


def weighted_sum(gradient: Float[Array, "B ..."], factor: Float[Array, " B"]) -> Array:
    """sum over b of factor[b] gradient[b]; examples with factor 0 are left out, even if they are not finite."""
    factor = factor.reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.sum(jnp.where(factor == 0, 0, factor * gradient), axis=0)


def _of_experts(rows, d_rows, experts, factor, num_experts: int):
    """sum over the rows r of each expert of factor[r] rows[r]^T d_rows[r], (E, D, F); float32."""
    counts = (experts >= 0) & (factor != 0)[:, None]
    d_rows = jnp.where(counts[..., None], factor[:, None, None] * d_rows.astype(jnp.float32), 0)
    rows = jnp.where(counts[..., None], rows, 0).astype(jnp.float32)
    experts = jnp.where(counts, experts, num_experts).reshape(-1)
    order = jnp.argsort(experts, stable=True)
    rows, d_rows = (a.reshape(-1, a.shape[-1])[order] for a in (rows, d_rows))
    sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    weights = jnp.zeros((num_experts, rows.shape[1], d_rows.shape[1]), jnp.float32)
    return jax.vjp(lambda w: grouped_matmul(rows, w, sizes), weights)[1](d_rows)[0]


def same_dtype(*arrays):
    """The arrays unchanged if they have one dtype, else all in float32."""
    alike = len({a.dtype for a in arrays}) == 1
    return arrays if alike else tuple(a.astype(jnp.float32) for a in arrays)


def activation_dims(dims: tuple[str, ...]) -> tuple[str, ...]:
    """Dims of an activation with a parameter's dims: "D" and "V" are not sharded, the batch uses their mesh axis."""
    return tuple("." if dim in ("D", "V") else dim for dim in dims)


def _with_middle(hooked: HookedGradients, dims: tuple[str, ...], num_in: int):
    inputs, outputs = activation_dims(dims[:num_in]), activation_dims(dims[num_in:])
    return (hooked.inputs.ndim - 1 - len(inputs), inputs), (hooked.outputs.ndim - 1 - len(outputs), outputs)
