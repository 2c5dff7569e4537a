"""The public function `qk_norm_rope` and the table of its implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import arguments
from ..op import Kernel, Op
from . import cost, reference, triton
from .cases import CASES
from .rotation import Rotation


QK_NORM_ROPE = Op(
    name="qk_norm_rope",
    reference=reference.qk_norm_rope,
    kernels={"triton": Kernel(triton.forward, triton.backward, triton.unsupported)},
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=CASES,
)


def qk_norm_rope(
    qkv: Float[Array, "B T K M H"],
    q_weight: Float[Array, " H"] | None = None,
    k_weight: Float[Array, " H"] | None = None,
    rotation: Rotation | None = None,
    *,
    interleaved: bool = False,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Splits a packed QKV projection into (q, k, v), with QK-norm (RMSNorm per head) and RoPE applied to q and k.

        q, k = turn(rms_norm(q) * q_weight), turn(rms_norm(k) * k_weight)
        turn(a, b) = (a cos - b sin, b cos + a sin)       for each pair of a head's elements

    `qkv` is the output of one projection: for each of K key heads its M - 2 query heads, its key and its value. It is
    packed because XLA would copy a slice of it before passing it to a kernel. Query head n is member n % (M - 2) of key
    head n // (M - 2). Pairs are (x_i, x_{i + H/2}), or (x_{2i}, x_{2i + 1}) if `interleaved`. Without weights there is
    no normalisation; without a rotation there is no RoPE. The computation is in float32; q, k and v have the dtype of
    `qkv`. The rotation has no gradient.

    `eps` is a number known before jit.

    Raises:
      ValueError: the shapes or dtypes do not fit together, `eps` is no number of 0 or more, or `implementation` is
        unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: QK-norm arXiv 2302.05442, section 2; RoPE arXiv 2104.09864, equation 34. `Rotation` has the angles.
    """
    checked = _checked(qkv, q_weight, k_weight, rotation, interleaved, eps)
    qkv, q_weight, k_weight, rotation, interleaved, eps = checked
    B, T, _, M, H = qkv.shape if qkv.ndim == 5 else (0,) * 5
    if M < 3 or H % 2:
        raise ValueError(
            f"qk_norm_rope: qkv is {qkv.shape}; give it as (B, T, K, M, H), M - 2 query heads, a key and a "
            "value for each key head, and an even H."
        )
    shapes = [None if weight is None else weight.shape for weight in (q_weight, k_weight)]
    if shapes not in ([None, None], [(H,), (H,)]):
        raise ValueError(f"qk_norm_rope: weights {shapes} do not fit H = {H}; give both as (H,), or neither.")
    if rotation is not None and not rotation.cos.shape == rotation.sin.shape in [(1, T, H // 2), (B, T, H // 2)]:
        raise ValueError(
            f"qk_norm_rope: rotation of {rotation.cos.shape} and {rotation.sin.shape} does not fit qkv {qkv.shape}; "
            f"give it as (B, T, H/2) = {(B, T, H // 2)}, or one row for all examples."
        )
    arrays = (qkv, q_weight, k_weight, rotation)
    return QK_NORM_ROPE(*arrays, interleaved=interleaved, eps=eps, implementation=implementation)


def _checked(qkv, q_weight, k_weight, rotation, interleaved, eps):
    """The arguments, each of the kind that it must be; raises ValueError."""
    name = "qk_norm_rope"
    [qkv] = arguments.floats(name, qkv=qkv)
    both = ("q_weight", "k_weight")
    q_weight, k_weight = arguments.floats(name, optional=both, q_weight=q_weight, k_weight=k_weight)
    eps = arguments.number(name, "eps", eps, "a learned eps is not supported", low=0)
    interleaved = arguments.flag(name, "interleaved", interleaved)
    if rotation is not None:
        if not isinstance(rotation, Rotation):
            raise ValueError(
                f"{name}: rotation must be a Rotation, got {arguments.kind_of(rotation)}; use Rotation.of."
            )
        cos, sin = arguments.floats(name, **{"rotation.cos": rotation.cos, "rotation.sin": rotation.sin})
        rotation = Rotation(cos.astype(jnp.float32), sin.astype(jnp.float32))
    return qkv, q_weight, k_weight, rotation, interleaved, eps
