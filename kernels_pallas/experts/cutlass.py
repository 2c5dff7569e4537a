"""grouped_matmul on Hopper by NVIDIA's CUTLASS, to compare with: csrc/cutlass/grouped_gemm.cu, a custom call.

Its grouped GEMM with a pointer array: TMA, wgmma, a persistent kernel over all groups' tiles of 128 x 256. The backward
is the Triton road's, both of its products: what is compared is the forward.

Source: CUTLASS 4.2, GemmUniversal with KernelPtrArrayTmaWarpSpecializedCooperative.
"""

import jax

from .. import backend
from ..ffi import custom_calls
from . import triton


DTYPES = ("bfloat16", "float16")
ALIGN = 8  # numbers in the 16 bytes that TMA wants rows to be multiples of


def unsupported(x, w, group_sizes) -> str | None:
    """None, or why these arguments cannot run here."""
    device = backend.target()
    if device.platform != "gpu" or device.capability != 9.0:
        return f"needs a Hopper GPU (compute capability 9.0), got {device.kind}"
    if x.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    if group_sizes.dtype.name != "int32":
        return f"needs int32 group_sizes, got {group_sizes.dtype}"
    if w.shape[1] % ALIGN or w.shape[2] % ALIGN:
        return f"needs matrices whose sides are multiples of {ALIGN}, got {w.shape[1]} x {w.shape[2]}"
    return custom_calls.why_not("cutlass")


def forward(x, w, group_sizes):
    """The products (R, F), and the arguments for the backward."""
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    return custom_calls.call("grouped_gemm", out, x, w, group_sizes), (x, w, group_sizes)


def backward(residuals, d_y):
    """d_x and d_w, by Triton."""
    return triton.backward(residuals, d_y)
