"""Shared code of the Pallas-Triton kernels: the launch and the matrix product."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend


def run(kernel, *arrays, name, programs, blocks, out_shape, work):
    """Launches `kernel` with refs of whole arrays and with the num_warps and num_stages of `blocks`.

    The grid has one dimension, because the other dimensions are limited to 65,535 and are left to vmap.
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
    """The product, accumulated in float32. float32 operands are not rounded to TF32, which is Triton's default."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)
