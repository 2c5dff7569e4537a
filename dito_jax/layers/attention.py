"""Multi-head self-attention with grouped queries, QK-norm and rotary positions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.gradient_hooks import with_weight_hooks
from dito_jax.layers.linear import linear
from dito_jax.sharding import axis_size, on_mesh
from kernels_pallas import Rotation, flash_attention, qk_norm_rope


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v without a mask: every token attends to every token.

    One projection computes q, k and v. Its output is ordered by key/value head, each followed by its group of query
    heads, so that sharding key/value heads over the mesh axis "tensor" keeps each group on one device and moves no
    data. QK-norm (RMSNorm over each head, arXiv 2302.05442) keeps attention logits bounded. `attend` is the attention
    function, e.g. flash_attention_jvp for forward-mode differentiation. A positive `adapter_rank` adds LoRA adapters to
    the projections.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qk_norm: bool,
        adapter_rank: int = 0,
        attend: Callable[..., Any] = flash_attention,
        implementation: str | None = None,
        qk_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.attend = functools.partial(attend, implementation=implementation)
        self.prepare = functools.partial(qk_norm_rope, implementation=qk_implementation)
        head_width, group = width // num_heads, num_heads // num_kv_heads
        make = functools.partial(linear, adapter_rank=adapter_rank, rngs=rngs)
        self.qkv = make(width, (num_kv_heads, group + 2, head_width), "D K . H")
        self.out = make((num_heads, head_width), width, "N H D")
        ones = lambda: nnx.Param(jnp.ones(head_width, jnp.float32), dims="H") if qk_norm else None
        self.q_norm, self.k_norm = ones(), ones()

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation | None) -> Float[Array, "B T D"]:
        weights = [None if norm is None else norm[...] for norm in (self.q_norm, self.k_norm)]
        each = "B" if rotation is not None and rotation.cos.shape[0] > 1 else "."
        prepare = on_mesh(self.prepare, ("B T K . .", ".", ".", f"{each} T ."), ("B T N .", "B T K .", "B T K ."))
        packed = self.qkv(x)
        out = prepare(packed, *weights, rotation)
        q, k, v = with_weight_hooks(
            self, ("q_norm", "k_norm"), self.weight_gradients, (packed, weights, rotation), out, through=packed
        )
        attend = on_mesh(self.attend, ("B T N H", "B S K H", "B S K H"), "B T N H")
        return self.out(attend(q, k, v))

    def weight_gradients(self, arrays: Any, d_out: Any) -> tuple[Float[Array, "B H"], ...]:
        """Gradients of the two QK-norm weights for each row of the batch."""
        packed, weights, rotation = arrays

        def on_device(packed, d_out, weights, rotation):
            def of_row(packed, d_out):
                _, pull = jax.vjp(lambda q, k: self.prepare(packed[None], q, k, rotation), *weights)
                return pull(jax.tree.map(lambda d: d[None], d_out))

            gradients = jax.vmap(of_row)(packed, d_out)
            return (
                jax.tree.map(lambda g: jax.lax.psum(g, "tensor"), gradients) if axis_size("tensor") > 1 else gradients
            )

        dims = ("B T K . .", ("B T N .", "B T K .", "B T K ."), ".", ". T .")
        return on_mesh(on_device, dims, ("B .", "B ."))(packed, d_out, weights, rotation)
