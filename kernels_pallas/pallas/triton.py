"""What every kernel of the Triton road shares: how it is launched, and its product."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend


def run(kernel, *arrays, name, programs, blocks, out_shape, work):
    """Runs `kernel` over whole refs, with the num_warps and num_stages of `blocks`.

    A grid of one dimension: the others hold 65,535 at most, and are left to vmap.
    """
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(programs,),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), arrays),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape),
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        cost_estimate=work.estimate(),
        interpret=backend.interpret(),
    )(*arrays)


def dot(a, b, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Accumulates in float32; float32 operands keep all their bits, where the default rounds them to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)
