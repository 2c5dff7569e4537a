"""Reference implementation of QK-norm and RoPE in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .rotation import Rotation


def qk_norm_rope(
    qkv: Float[Array, "B T K M H"],
    q_weight: Float[Array, " H"] | None,
    k_weight: Float[Array, " H"] | None,
    rotation: Rotation | None,
    *,
    interleaved: bool,
    eps: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """q, k and v; q and k are normalised and rotated in float32."""
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    q = q.reshape(*q.shape[:2], -1, q.shape[-1])  # query head n = key head * (M - 2) + member

    def prepared(x, weight):
        y = x.astype(jnp.float32)
        if weight is not None:
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
            y = y * weight.astype(jnp.float32)[None, None, None]
        if rotation is not None:
            y = _turned(y, jax.lax.stop_gradient(rotation), interleaved)
        return y.astype(x.dtype)

    return prepared(q, q_weight), prepared(k, k_weight), v


def _turned(x, rotation: Rotation, interleaved: bool):
    """Each pair (a, b) of x becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]
    half = x.shape[-1] // 2
    pairs = x.reshape(*x.shape[:-1], half, 2) if interleaved else jnp.stack([x[..., :half], x[..., half:]], axis=-1)
    a, b = pairs[..., 0], pairs[..., 1]
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return jnp.stack([first, second], axis=-1).reshape(x.shape)
    return jnp.concatenate([first, second], axis=-1)
