"""The public MLP functions, `gated_mlp` and `dense_mlp`, and their implementation tables."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from .. import arguments
from ..op import Kernel, Op
from . import cost, mosaic_gpu, reference, triton
from .blocks import PASSES, candidates
from .cases import DENSE_CASES, GATED_CASES


Activation = Literal["silu", "gelu_tanh"]


def _op(name: str, definition, kernels, forward, backward, cases) -> Op:
    tried = {f"{name}_{pass_}.triton": candidates for pass_ in PASSES}
    kernels |= {"triton": Kernel(forward, backward, triton.unsupported, candidates=tried)}
    return Op(name, definition, kernels, {"forward": cost.forward, "backward": cost.backward}, cases)


HOPPER = Kernel(
    mosaic_gpu.forward,
    mosaic_gpu.backward,
    mosaic_gpu.unsupported,
    candidates=mosaic_gpu.CANDIDATES,
    needs_gpu_proof=True,
)
GATED_MLP = _op(
    "gated_mlp",
    reference.gated_mlp,
    {"mosaic_gpu": HOPPER},
    triton.gated_forward,
    triton.gated_backward,
    GATED_CASES,
)
DENSE_MLP = _op("dense_mlp", reference.dense_mlp, {}, triton.dense_forward, triton.dense_backward, DENSE_CASES)


def gated_mlp(
    x: Float[Array, "*B D"],
    w_gate_up: Float[Array, "D 2 F"],
    w_down: Float[Array, "F D"],
    *,
    activation: Activation = "silu",
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """The gated MLP: SwiGLU with "silu", GEGLU with "gelu_tanh".

        y = (f(x w_gate) * x w_up) w_down

    `w_gate_up` holds w_gate and w_up side by side, so that they are one product. Accumulation is in float32; the output
    has the dtype of `x`. Beside the inputs, only the pre-activations are kept for the backward, in the dtype of `x`.

    Raises:
      ValueError: the shapes do not fit together, an array is not of a floating-point dtype, or `activation` or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: arXiv 2002.05202, equation 6.
    """
    x, w_gate_up, w_down = arguments.floats("gated_mlp", x=x, w_gate_up=w_gate_up, w_down=w_down)
    D = _width("gated_mlp", x)
    if w_gate_up.ndim != 3 or w_gate_up.shape[:2] != (D, 2) or w_down.shape != (w_gate_up.shape[2], D):
        raise ValueError(
            f"gated_mlp: x {x.shape}, w_gate_up {w_gate_up.shape} and w_down {w_down.shape} do not fit; give x as "
            "(..., D), w_gate_up as (D, 2, F), w_down as (F, D)."
        )
    _check("gated_mlp", activation)
    y = GATED_MLP(x.reshape(-1, D), w_gate_up, w_down, activation=activation, implementation=implementation)
    return y.reshape(x.shape)


def dense_mlp(
    x: Float[Array, "*B D"],
    w_up: Float[Array, "D F"],
    b_up: Float[Array, " F"],
    w_down: Float[Array, "F D"],
    b_down: Float[Array, " D"],
    *,
    activation: Activation = "gelu_tanh",
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """The MLP of the original transformer and of DiT.

        y = f(x w_up + b_up) w_down + b_down

    Accumulation is in float32; the output has the dtype of `x`. Beside the inputs, only the pre-activations are kept
    for the backward, in the dtype of `x`.

    Raises:
      ValueError: the shapes do not fit together, an array is not of a floating-point dtype, or `activation` or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: arXiv 1706.03762, equation 2, with GELU (arXiv 1606.08415).
    """
    name = "dense_mlp"
    x, w_up, b_up = arguments.floats(name, x=x, w_up=w_up, b_up=b_up)
    w_down, b_down = arguments.floats(name, w_down=w_down, b_down=b_down)
    D, F = _width(name, x), w_up.shape[-1] if w_up.ndim else 0
    if not (w_up.shape == (D, F) and b_up.shape == (F,) and w_down.shape == (F, D) and b_down.shape == (D,)):
        raise ValueError(
            f"dense_mlp: x {x.shape}, w_up {w_up.shape}, b_up {b_up.shape}, w_down {w_down.shape} and b_down "
            f"{b_down.shape} do not fit; give x as (..., D), the rest as (D, F), (F,), (F, D) and (D,)."
        )
    _check("dense_mlp", activation)
    arrays = (x.reshape(-1, D), w_up, b_up, w_down, b_down)
    return DENSE_MLP(*arrays, activation=activation, implementation=implementation).reshape(x.shape)


def _width(name: str, x) -> int:
    """D of x (..., D)."""
    if x.ndim == 0:
        raise ValueError(f"{name}: x must be (..., D), got a scalar.")
    return x.shape[-1]


def _check(name: str, activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"{name}: no {activation=}; choose from {', '.join(get_args(Activation))}.")
