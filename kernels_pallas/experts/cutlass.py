"""CUTLASS baseline of grouped_matmul on Hopper, an FFI custom call: csrc/cutlass/grouped_gemm.cu.

CUTLASS's pointer-array grouped GEMM: a persistent kernel with TMA and wgmma over the 128 x 256 tiles of all groups.
Only the forward is CUTLASS; both products of the backward are the Triton kernels'.

Source: CUTLASS 4.2, GemmUniversal with KernelPtrArrayTmaWarpSpecializedCooperative.
"""

import jax

from .. import backend
from ..ffi import custom_calls
from . import triton


DTYPES = ("bfloat16", "float16")
ALIGN = 8  # 16-bit numbers in 16 bytes: TMA needs rows that are multiples of 16 bytes


def unsupported(x, w, group_sizes) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    device = backend.target()
    if device.platform != "gpu" or device.capability != 9.0:
        return f"needs a Hopper GPU (compute capability 9.0), got {device.kind}"
    if x.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    if group_sizes.dtype.name != "int32":
        return f"needs int32 group_sizes, got {group_sizes.dtype}"
    if w.shape[1] % ALIGN or w.shape[2] % ALIGN:
        return f"needs matrix dimensions that are multiples of {ALIGN}, got {w.shape[1]} x {w.shape[2]}"
    return custom_calls.why_not("cutlass")


def forward(x, w, group_sizes):
    """The products (R, F), and the arguments as residuals."""
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    return custom_calls.call("grouped_gemm", out, x, w, group_sizes), (x, w, group_sizes)


def backward(residuals, d_y):
    """d_x and d_w, by Triton."""
    return triton.backward(residuals, d_y)
