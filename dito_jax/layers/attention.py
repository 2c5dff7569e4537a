"""Multi-head self-attention with grouped queries, QK-norm and rotary positions."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.linear import linear
from dito_jax.layers.rope import Rotation, rotate
from dito_jax.sharding import on_mesh
from kernels_pallas import flash_attention


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v, every token seeing every token.

    One projection makes q, k and v. Its output is ordered by key/value head, each with its own group of query heads
    beside it, so that splitting key/value heads over devices (mesh axis "tensor") separates no group and moves no
    data. `attend` is what computes it, e.g. flash_attention_jvp where the model is differentiated forward.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qk_norm: bool,
        attend: Callable[..., Any] = flash_attention,
        rngs: nnx.Rngs,
    ):
        self.attend = attend
        head_width, group = width // num_heads, num_heads // num_kv_heads
        self.qkv = linear(width, (num_kv_heads, group + 2, head_width), "D K . H", rngs=rngs)
        self.out = linear((num_heads, head_width), width, "N H D", rngs=rngs)
        self.q_norm = _head_norm(head_width, rngs=rngs) if qk_norm else None
        self.k_norm = _head_norm(head_width, rngs=rngs) if qk_norm else None

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation | None) -> Float[Array, "B T D"]:
        qkv = self.qkv(x)  # (B, T, K, group + q k v, H)
        k, v = qkv[..., -2, :], qkv[..., -1, :]
        q = qkv[..., :-2, :].reshape(*x.shape[:2], -1, qkv.shape[-1])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attend = on_mesh(self.attend, ("B T N H", "B S K H", "B S K H"), "B T N H")
        return self.out(attend(q, k, v))


def _head_norm(head_width: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over each head: keeps attention logits bounded (QK-norm, arXiv 2302.05442)."""
    return nnx.RMSNorm(head_width, epsilon=1e-6, param_dtype=jnp.float32, rngs=rngs, scale_metadata={"dims": "H"})
