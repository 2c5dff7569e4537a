"""The gated MLP for Hopper in Pallas-Mosaic-GPU: warp-specialised, with TMA copies and wgmma products.

A producer warpgroup fills a ring buffer of slots; two consumer warpgroups have 64 rows each (pallas/mosaic_gpu.py). The
kernels compute the same as the Triton kernels: in the forward gate, up and the activation; in the backward the
gradients of gate and up and the activation again, in the epilogue. XLA computes the products without an epilogue.

What is verified without a GPU: the arithmetic and the synchronisation of the copies, by JAX's interpreter and its race
detector, at small sizes; and the machine code for sm_90a at the models' sizes, without spills. The interpreter runs
products synchronously, while they are asynchronous on the GPU.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import backend, tuning
from ..pallas.mosaic_gpu import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    DEPTH,
    ROWS,
    Stream,
    fill,
    free,
    multiply,
    operand,
    ready,
    round_up,
    run_kernel,
)  # fmt: skip
from ..pallas.triton_tiles import tile_of_program
from .activations import activated, value_and_derivative
from .triton import product


DTYPES = ("bfloat16", "float16")
ALIGN = 8  # rows of a swizzled block of TMA


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel: the output tile is CONSUMERS x ROWS rows by `columns`."""

    columns: int
    stages: int  # slots of the ring buffer


UNTUNED = {"forward_up": Blocks(128, 4), "backward_dz": Blocks(128, 4)}


def candidates(default: Blocks, *, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`."""
    del default, dtype, width, mask, size
    for columns, stages in itertools.product((64, 128), (2, 3, 4, 5)):
        yield Blocks(columns, stages)


CANDIDATES = {f"gated_mlp_{kernel}.mosaic_gpu": candidates for kernel in UNTUNED}


def unsupported(x, w_gate_up, w_down, *, activation) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del activation
    device = backend.target()
    if not backend.interpret() and (device.platform != "gpu" or device.capability != 9.0):
        return f"needs a Hopper GPU (compute capability 9.0), got {device.kind}"
    if x.dtype.name not in DTYPES or not x.dtype == w_gate_up.dtype == w_down.dtype:
        names = [array.dtype.name for array in (x, w_gate_up, w_down)]
        return f"needs all arrays in one dtype among {', '.join(DTYPES)}, got {names}"
    if any(side % DEPTH for side in w_down.shape):
        return f"needs widths that are multiples of {DEPTH}, got D = {w_down.shape[1]} and F = {w_down.shape[0]}"
    return None


def forward(x, w_gate_up, w_down, *, activation):
    """The output, and (x, w_gate_up, w_down, z): z are the pre-activations, (R, 2, F)."""
    z, hidden = _up(x, w_gate_up, activation)
    return product(hidden, w_down), (x, w_gate_up, w_down, z)


def backward(residuals, d_out, *, activation):
    """d_x, d_w_gate_up and d_w_down."""
    x, w_gate_up, w_down, z = residuals
    d_z, hidden = _d_z(d_out, w_down, z, activation)
    (D, _, F), d_z = w_gate_up.shape, d_z.reshape(d_z.shape[0], -1)
    d_x = product(d_z, w_gate_up.reshape(D, 2 * F), 1, 1)
    return d_x, product(x, d_z, 0, 0).reshape(D, 2, F), product(hidden, d_out, 0, 0)


def _up(x, w_gate_up, activation):
    """z = x w, (R, 2, F), and f(gate) * up, (R, F)."""
    (R, D), F = x.shape, w_gate_up.shape[2]
    blocks = _blocks("forward_up", x.dtype, D, F, R)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, x.dtype)
    matrix = operand(blocks.stages, DEPTH, of(blocks.columns))
    z, hidden = run_kernel(
        functools.partial(_up_kernel, activation=activation, blocks=blocks),
        *(whole_rows(x), w_gate_up.reshape(D, 2 * F)),
        name="gated_mlp_forward_up",
        programs=pl.cdiv(R, CONSUMERS * ROWS) * pl.cdiv(F, blocks.columns),
        out_type=[of(round_up(R, ALIGN), 2, F), of(round_up(R, ALIGN), F)],
        scratch=[
            *(operand(blocks.stages, CONSUMERS * ROWS, of(DEPTH)), matrix, matrix),
            plgpu.SMEM((CONSUMERS, ROWS, blocks.columns), x.dtype),
            *(ready(blocks, copies=3), free(blocks)),
        ],
    )
    return z[:R], hidden[:R]


def _d_z(d_out, w_down, z, activation):
    """The gradient of z, (R, 2, F), and f(gate) * up, recomputed."""
    (R, D), F = d_out.shape, w_down.shape[0]
    blocks = _blocks("backward_dz", z.dtype, D, F, R)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, z.dtype)
    tile = plgpu.SMEM((CONSUMERS, ROWS, blocks.columns), z.dtype)
    d_z, hidden = run_kernel(
        functools.partial(_d_z_kernel, activation=activation, blocks=blocks),
        *(whole_rows(d_out), w_down, whole_rows(z)),
        name="gated_mlp_backward_dz",
        programs=pl.cdiv(R, CONSUMERS * ROWS) * pl.cdiv(F, blocks.columns),
        out_type=[of(round_up(R, ALIGN), 2, F), of(round_up(R, ALIGN), F)],
        scratch=[
            operand(blocks.stages, CONSUMERS * ROWS, of(DEPTH)),
            operand(blocks.stages, blocks.columns, of(DEPTH)),
            *(tile, tile, tile, plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2)),
            *(ready(blocks, copies=2), free(blocks)),
        ],
    )
    return d_z[:R], hidden[:R]


def _blocks(kernel: str, dtype, depth: int, columns: int, rows: int) -> Blocks:
    name = f"gated_mlp_{kernel}.mosaic_gpu"
    return tuning.blocks(name, UNTUNED[kernel], dtype=dtype, width=depth, mask=f"columns={columns}", size=rows)


def whole_rows(x):
    """Pads the rows of x to a multiple of ALIGN for TMA; x itself if they are one."""
    return jnp.pad(x, ((0, -x.shape[0] % ALIGN), *((0, 0),) * (x.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a program: rows from `row`, columns from `column`. Past the edges TMA reads zeros, writes nothing."""

    row: jax.Array
    column: jax.Array
    steps: jax.Array  # steps of the contraction

    @classmethod
    def of_program(cls, rows: int, width: int, depth: int, blocks) -> "Tile":
        counts = pl.cdiv(rows, CONSUMERS * ROWS), pl.cdiv(width, blocks.columns)
        row, column = tile_of_program(lax.axis_index("program"), *counts)
        return cls(row * (CONSUMERS * ROWS), column * blocks.columns, jnp.int32(pl.cdiv(depth, DEPTH)))

    def of_consumer(self, me):
        """The rows of one consumer."""
        return pl.ds(self.row + me * ROWS, ROWS)


def _depth(i):
    return pl.ds(i * DEPTH, DEPTH)


def _store(smem, me, *results) -> None:
    """Computes and writes (function, destination) pairs in order, through a consumer's own tile in shared memory."""
    for make, where in results:
        smem.at[me][...] = make().astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[me], where)
        plgpu.wait_smem_to_gmem(0)


def _up_kernel(
    x_ref, w_ref, z_ref, hidden_ref, x_smem, gate_smem, up_smem, out_smem, ready, free, *, activation, blocks
):  # fmt: skip
    R, F = hidden_ref.shape
    tile = Tile.of_program(R, F, x_ref.shape[1], blocks)
    columns = pl.ds(tile.column, blocks.columns)
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        matrix = lambda start: lambda i: w_ref.at[_depth(i), pl.ds(start, blocks.columns)]
        rows = lambda i: x_ref.at[pl.ds(tile.row, CONSUMERS * ROWS), _depth(i)]
        copies = [(rows, x_smem), (matrix(tile.column), gate_smem), (matrix(tile.column + F), up_smem)]
        fill(tile, blocks, Stream(ready, free, copies))

    @pl.when(me < CONSUMERS)
    def _consumer_kernel():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

        def products(gate, up):
            slots = [lambda slot: gate_smem.at[slot], lambda slot: up_smem.at[slot]]
            multiply(tile, x_smem, slots, ready, free, me, [gate, up], blocks)
            return gate[...], up[...]

        acc = plgpu.WGMMAAccumulatorRef((ROWS, blocks.columns), jnp.float32)
        gate, up = (x.astype(z_ref.dtype) for x in pl.run_scoped(products, acc, acc))  # rounded, as for the backward
        rows = tile.of_consumer(me)
        hidden = lambda: activated(gate.astype(jnp.float32), activation) * up.astype(jnp.float32)
        _store(
            *(out_smem, me),
            (hidden, hidden_ref.at[rows, columns]),
            (lambda: gate, z_ref.at[rows, 0, columns]),
            (lambda: up, z_ref.at[rows, 1, columns]),
        )


def _d_z_kernel(
    d_out_ref, w_ref, z_ref, d_z_ref, hidden_ref, x_smem, w_smem, gate_smem, up_smem, out_smem, z_ready, ready, free, *,
    activation, blocks,
):  # fmt: skip
    R, F = hidden_ref.shape
    tile = Tile.of_program(R, F, d_out_ref.shape[1], blocks)
    columns = pl.ds(tile.column, blocks.columns)
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        rows = lambda i: d_out_ref.at[pl.ds(tile.row, CONSUMERS * ROWS), _depth(i)]
        fill(tile, blocks, Stream(ready, free, [(rows, x_smem), (lambda i: w_ref.at[columns, _depth(i)], w_smem)]))

    @pl.when(me < CONSUMERS)
    def _consumer_kernel():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        rows = tile.of_consumer(me)
        for i, smem in enumerate((gate_smem, up_smem)):  # these copies overlap with the product
            plgpu.copy_gmem_to_smem(z_ref.at[rows, i, columns], smem.at[me], z_ready.at[me])

        def product_of(acc):
            multiply(tile, x_smem, [lambda slot: w_smem.at[slot].transpose((1, 0))], ready, free, me, [acc], blocks)
            return acc[...]

        acc = plgpu.WGMMAAccumulatorRef((ROWS, blocks.columns), jnp.float32)
        d_hidden = pl.run_scoped(product_of, acc)
        plgpu.barrier_wait(z_ready.at[me])
        gate, up = (lambda smem=smem: smem.at[me][...].astype(jnp.float32) for smem in (gate_smem, up_smem))
        _store(  # each result reads z again, because the registers do not hold two of the three results and z
            *(out_smem, me),
            (lambda: activated(gate(), activation) * up(), hidden_ref.at[rows, columns]),
            (lambda: activated(gate(), activation) * d_hidden, d_z_ref.at[rows, 1, columns]),
            (lambda: value_and_derivative(gate(), activation)[1] * up() * d_hidden, d_z_ref.at[rows, 0, columns]),
        )
