"""Linear layers with named dimensions for sharding, per-example gradient hooks and optional LoRA adapters."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, variance_scaling, xavier_uniform, zeros
from jaxtyping import Array, Float

from dito_jax.layers.gradient_hooks import with_hook


class Linear(nnx.LinearGeneral):
    """flax's LinearGeneral with gradient hooks and a LoRA adapter: x W + b + (x A) B."""

    lora_a: Any
    lora_b: Any

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = with_hook(self, "kernel", x, super().__call__(x))
        if self.bias is not None:  # a bias trained without its kernel has its own hook, as a product with ones
            y = with_hook(self, "bias", jnp.ones(y.shape[: y.ndim - self.bias.ndim], y.dtype), y, through=x)
        if self.lora_a is None:
            return y
        a, b = self.lora_a[...], self.lora_b[...]
        low = with_hook(self, "lora_a", x, jnp.tensordot(x, a, a.ndim - 1))
        return y + with_hook(self, "lora_b", low, jnp.tensordot(low, b, 1))


def linear(
    shape_in: int | Sequence[int],
    shape_out: int | Sequence[int],
    dims: str,
    *,
    init: Initializer = xavier_uniform(),  # noqa: B008 (a pure function)
    bias: bool = True,
    adapter_rank: int = 0,
    rngs: nnx.Rngs,
) -> Linear:
    """A layer y = x @ kernel (+ bias) over the last dims of x; `dims` names the kernel's dims, inputs first.

    The initializer is applied to the kernel as one matrix (all inputs x all outputs) and biases start at zero, as in
    DiT. A positive `adapter_rank` adds an adapter (LoRA, arXiv 2106.09685) whose second matrix starts at zero.
    """
    shape_in = (shape_in,) if isinstance(shape_in, int) else tuple(shape_in)
    shape_out = (shape_out,) if isinstance(shape_out, int) else tuple(shape_out)
    dims_in, dims_out = dims.split()[: len(shape_in)], dims.split()[len(shape_in) :]
    made = Linear(
        shape_in,
        shape_out,
        axis=tuple(range(-len(shape_in), 0)),
        kernel_init=init,
        use_bias=bias,
        bias_init=zeros,
        rngs=rngs,
        kernel_metadata={"dims": dims},
        bias_metadata={"dims": " ".join(dims_out)},
    )
    a, b = None, None
    if adapter_rank:
        uniform = variance_scaling(1 / 3, "fan_in", "uniform")  # in +-1 / sqrt(inputs), as in the LoRA paper's code
        matrix = uniform(rngs.params(), (math.prod(shape_in), adapter_rank))
        a = nnx.Param(matrix.reshape(*shape_in, adapter_rank), dims=" ".join((*dims_in, ".")))
        b = nnx.Param(jnp.zeros((adapter_rank, *shape_out)), dims=" ".join((".", *dims_out)))
    made.lora_a, made.lora_b = a, b
    return made
