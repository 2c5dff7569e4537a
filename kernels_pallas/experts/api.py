"""The public MoE functions (dispatch, combine, grouped GEMM, expert MLP) and the tables of their implementations."""

from typing import Any

from jaxtyping import Array, Float, Int

from .. import arguments
from ..op import Kernel, Op
from . import cases, cost, cutlass, mosaic_gpu, mosaic_gpu_mlp, reference, triton, triton_mlp, triton_rows
from .blocks import CANDIDATES
from .routing import Routing, settled


DISPATCH = Op(
    name="dispatch",
    reference=reference.dispatch,
    kernels={"triton": Kernel(triton_rows.dispatch_forward, triton_rows.dispatch_backward, triton_rows.unsupported)},
    cost={"forward": cost.dispatch_forward, "backward": cost.dispatch_backward},
    cases=cases.DISPATCH,
)
COMBINE = Op(
    name="combine",
    reference=reference.combine,
    kernels={"triton": Kernel(triton_rows.combine_forward, triton_rows.combine_backward, triton_rows.unsupported)},
    cost={"forward": cost.combine_forward, "backward": cost.combine_backward},
    cases=cases.COMBINE,
)
GROUPED_MATMUL = Op(
    name="grouped_matmul",
    reference=reference.grouped_matmul,
    kernels={
        "mosaic_gpu": Kernel(
            mosaic_gpu.forward,
            mosaic_gpu.backward,
            mosaic_gpu.unsupported,
            candidates=mosaic_gpu.CANDIDATES | CANDIDATES,
            needs_gpu_proof=True,
        ),
        "triton": Kernel(triton.forward, triton.backward, triton.unsupported, candidates=CANDIDATES),
        "cutlass": Kernel(cutlass.forward, cutlass.backward, cutlass.unsupported, external=True, needs_gpu_proof=True),
    },
    cost={"forward": cost.matmul_forward, "backward": cost.matmul_backward},
    cases=cases.GROUPED_MATMUL,
    sweep=cases.GROUPED_MATMUL_SWEEP,
)
EXPERT_MLP = Op(
    name="expert_mlp",
    reference=reference.expert_mlp,
    kernels={
        "mosaic_gpu": Kernel(
            mosaic_gpu_mlp.forward,
            triton_mlp.backward,
            mosaic_gpu_mlp.unsupported,
            candidates=mosaic_gpu.CANDIDATES | CANDIDATES,
            needs_gpu_proof=True,
        ),
        "triton": Kernel(triton_mlp.forward, triton_mlp.backward, triton_mlp.unsupported, candidates=CANDIDATES),
    },
    cost={"forward": cost.mlp_forward, "backward": cost.mlp_backward},
    cases=cases.EXPERT_MLP,
    sweep=cases.EXPERT_MLP_SWEEP,
)


def dispatch(x: Float[Array, "T D"], routing: Routing, *, implementation: str | None = None) -> Float[Array, "R D"]:
    """Gathers tokens into rows sorted by expert: x[row_index], with zeros in padding rows.

    The backward sums the rows of each token in a fixed order, without atomics. NaN in one token stays in its rows.
    Numbers of the routing that are out of range under jit, where they are not known, are clipped.

    Raises:
      ValueError: `x` is no (T, D) of a floating-point dtype, the routing has another number of tokens or a known number
        out of range, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.
    """
    x, routing = _settled("dispatch", routing, tokens=True, x=x)
    return DISPATCH(x, routing, implementation=implementation)


def combine(y: Float[Array, "R D"], routing: Routing, *, implementation: str | None = None) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows: out[t] = sum over its rows r of row_weight[r] y[r]; 0 without rows.

    The sum is in float32, in the order of experts. The result has the dtype of `y`; the gradient of the weights is
    float32. NaN in a row or its weight stays in the row's token; padding rows and their weights are ignored.

    Raises:
      ValueError: `y` is no (R, D) of a floating-point dtype, the routing has another number of rows or a known number
        out of range, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.
    """
    y, routing = _settled("combine", routing, tokens=False, y=y)
    return COMBINE(y, routing, implementation=implementation)


def grouped_matmul(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """Grouped GEMM: multiplies each row with its expert's matrix. The contract is that of jax.lax.ragged_dot.

        y[r] = x[r] w[e]   for the group_sizes[e] rows r of expert e, which follow those of the experts before e

    Rows from sum(group_sizes) on are padding: they give zeros and have no gradient, even if they are NaN. The gradient
    of the matrix of an expert without rows is exactly zero. NaN in a row or a matrix stays with that expert.
    Accumulation is in float32; `y` has the dtype of x and w. Group sizes that are not known, under jit, are cut: those
    below 0 count as 0, and groups end at the last row.

    Raises:
      ValueError: the shapes or dtypes do not fit together, group sizes are known and negative or have a sum above R, or
        there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: MegaBlocks, https://arxiv.org/abs/2211.15841, section 5.
    """
    x, w = arguments.floats("grouped_matmul", x=x, w=w)
    group_sizes = arguments.integers("grouped_matmul", "group_sizes", group_sizes)
    if (
        x.ndim != 2
        or w.ndim != 3
        or group_sizes.ndim != 1
        or w.shape[:2] != (group_sizes.size, x.shape[1])
        or x.dtype != w.dtype
    ):
        raise ValueError(
            f"grouped_matmul: x {x.dtype} {x.shape}, w {w.dtype} {w.shape} and group_sizes {group_sizes.shape} do not "
            "fit; give x as (R, D), w as (E, D, F) of x's dtype, group_sizes as (E,)."
        )
    group_sizes = arguments.sizes("grouped_matmul", "group_sizes", group_sizes, x.shape[0])
    return GROUPED_MATMUL(x, w, group_sizes, implementation=implementation)


def expert_mlp(
    x: Float[Array, "T D"],
    routing: Routing,
    w_gate_up: Float[Array, "E D F2"],
    w_down: Float[Array, "E F D"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """The MoE MLP (SwiGLU): the gated MLP of each row's expert, and the weighted sum of each token's rows.

        out[t] = sum over the rows r of token t of row_weight[r] (silu(x[t] w_gate) * (x[t] w_up)) w_down

    with the matrices of the row's expert; w_gate_up holds w_gate in its first F columns and w_up in the others. A token
    without rows has output 0; the gradient of the matrices of an expert without rows is exactly zero. Accumulation is
    in float32; intermediate results are rounded to the dtype of `x`. The residuals of the backward are x, the routing,
    the matrices, and the pre-activations, (R, 2 F).

    Raises:
      ValueError: the shapes or dtypes do not fit together, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: SwiGLU, https://arxiv.org/abs/2002.05202, equation 6; the order of the backward, SonicMoE,
    https://arxiv.org/abs/2512.14080, section 3.
    """
    x, routing = _settled("expert_mlp", routing, tokens=True, x=x)
    w_gate_up, w_down = arguments.floats("expert_mlp", w_gate_up=w_gate_up, w_down=w_down)
    E, F, D = w_down.shape if w_down.ndim == 3 else (0, 0, 0)
    fits = x.shape[1] == D and w_gate_up.shape == (E, D, 2 * F) and routing.group_sizes.shape == (E,)
    if not fits or not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise ValueError(
            f"expert_mlp: x {x.dtype} {x.shape}, w_gate_up {w_gate_up.dtype} {w_gate_up.shape}, w_down {w_down.dtype} "
            f"{w_down.shape} and {routing.group_sizes.size} experts in the routing do not fit; give x as (T, D), "
            "w_gate_up as (E, D, 2 F), w_down as (E, F, D), of one dtype."
        )
    return EXPERT_MLP(x, routing, w_gate_up, w_down, implementation=implementation)


def _settled(function: str, routing: Any, *, tokens: bool, **named) -> tuple[Any, Routing]:
    """The array and the routing, checked; the array has a row for each token of the routing, or for each row."""
    [(name, _)] = named.items()
    [array] = arguments.floats(function, **named)
    if array.ndim != 2:
        raise ValueError(f"{function}: {name} must be ({'T' if tokens else 'R'}, D), got {array.shape}.")
    routing = settled(function, routing)
    what, of_routing = ("tokens", routing.token_sizes) if tokens else ("rows", routing.row_index)
    if of_routing.shape != array.shape[:1]:
        raise ValueError(
            f"{function}: the routing has {of_routing.size} {what}, the array has {array.shape[0]}; "
            f"route the array's {what}."
        )
    return array, routing
