"""Grouped GEMM for Hopper in Pallas-Mosaic-GPU: warp-specialised, with TMA copies and wgmma products.

A producer warpgroup fills a ring buffer of slots; two consumer warpgroups multiply 64 rows each (pallas/mosaic_gpu.py).
Programs have the row tiles of tiles.py, as in the Triton kernels. TMA loads swizzled blocks of 8 rows, so the load of a
tile starts at the multiple of 8 at or before its first row. The rows of neighbouring experts in a tile are multiplied
and not stored. A tile's own rows are stored in pieces of powers of two, because TMA needs static sizes. The backward
for x uses the matrix transposed by wgmma; the backward for w is the Triton kernel's.

What is verified without a GPU: the arithmetic and the synchronisation of the copies, by JAX's interpreter and its race
detector, at small sizes; and the machine code for sm_90a at the models' sizes, without spills. The interpreter runs
products synchronously, while they are asynchronous on the GPU. So no test on a CPU shows that each product is awaited
before its slot is freed.
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
)
from ..pallas.triton_tiles import tile_of_program
from . import triton
from .blocks import NAMES
from .tiles import row_tiles


DTYPES = ("bfloat16", "float16")
ALIGN = 8  # rows of a swizzled block of TMA


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel: the output tile is CONSUMERS x ROWS rows by `columns`."""

    columns: int
    stages: int  # slots of the ring buffer


UNTUNED = {"forward": Blocks(256, 3), "down": Blocks(256, 3), "dx": Blocks(256, 3), "up": Blocks(128, 4)}


def candidates(default: Blocks, *, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`."""
    del dtype, width, mask, size
    for columns, stages in itertools.product((128, 192, 256), (2, 3, 4, 5)):
        if columns <= default.columns:
            yield Blocks(columns, stages)


CANDIDATES = {f"{NAMES[kernel]}.mosaic_gpu": candidates for kernel in UNTUNED}


def blocks_for(kernel: str, dtype, depth: int, columns: int, group: int) -> Blocks:
    """The block sizes of one of NAMES; the arguments are those of blocks.blocks_for."""
    name = f"{NAMES[kernel]}.mosaic_gpu"
    return tuning.blocks(name, UNTUNED[kernel], dtype=dtype, width=depth, mask=f"columns={columns}", size=group)


def unsupported(x, w, group_sizes) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del group_sizes
    device = backend.target()
    if not backend.interpret() and (device.platform != "gpu" or device.capability != 9.0):
        return f"needs a Hopper GPU (compute capability 9.0), got {device.kind}"
    if x.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    if w.shape[1] % DEPTH or w.shape[2] % DEPTH:
        return f"needs matrix dimensions that are multiples of {DEPTH}, got {w.shape[1]} x {w.shape[2]}"
    return None


def forward(x, w, group_sizes):
    """The products, and the arguments as residuals."""
    return product(x, w, group_sizes, kernel="forward", rest=True), (x, w, group_sizes)


def backward(residuals, d_y):
    """d_x and d_w."""
    x, w, group_sizes = residuals
    d_x = product(d_y, w, group_sizes, kernel="dx", transposed=True, rest=True)
    return d_x, triton.weight_gradient(x, d_y, group_sizes, kernel="dw"), None


def product(x, w, group_sizes, *, kernel: str, transposed: bool = False, rest: bool = False):
    """x[r] w[e] for each row and its expert, or x[r] w[e]^T; `rest` also writes zeros to the padding rows."""
    (R, depth), width = x.shape, w.shape[1 if transposed else 2]
    blocks = blocks_for(kernel, x.dtype, depth, width, R // w.shape[0])
    tiles = row_tiles(group_sizes, R, CONSUMERS * ROWS, rest=rest, align=ALIGN)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, x.dtype)
    matrix = (blocks.columns, of(DEPTH)) if transposed else (DEPTH, of(blocks.columns))
    out = run_kernel(
        functools.partial(_product_kernel, transposed=transposed, blocks=blocks),
        *(whole_rows(x), w, tiles),
        name=NAMES[kernel],
        programs=tiles.start.size * pl.cdiv(width, blocks.columns),
        out_type=of(round_up(R, ALIGN), width),
        scratch=[
            operand(blocks.stages, CONSUMERS * ROWS, of(DEPTH)),
            operand(blocks.stages, *matrix),
            plgpu.SMEM((CONSUMERS, ROWS, blocks.columns), x.dtype),
            ready(blocks, copies=2),
            free(blocks),
        ],
    )
    return out[:R]


def whole_rows(x):
    """Pads R of (R, D) to a multiple of ALIGN for TMA; x itself if it is one."""
    return jnp.pad(x, ((0, -x.shape[0] % ALIGN), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a program: rows start to stop of one expert, loaded from row `first`, and columns from `column`."""

    expert: jax.Array
    first: jax.Array
    start: jax.Array
    stop: jax.Array
    column: jax.Array
    steps: jax.Array  # steps of the contraction; 0 if the rows are padding

    @classmethod
    def of_program(cls, tiles, num_experts: int, width: int, depth: int, blocks) -> "Tile":
        program = lax.axis_index("program")
        tile, column = tile_of_program(program, tiles.start.shape[0], pl.cdiv(width, blocks.columns))
        start, stop, expert = tiles.start[tile], tiles.stop[tile], tiles.expert[tile]
        enabled = (start < stop) & (expert < num_experts)
        steps = jnp.where(enabled, jnp.int32(pl.cdiv(depth, DEPTH)), jnp.int32(0))
        first = lax.div(start, jnp.int32(ALIGN)) * ALIGN
        return cls(jnp.minimum(expert, num_experts - 1), first, start, stop, column * blocks.columns, steps)

    def rows(self, i):
        """The index in x of the rows and of one block of the contraction."""
        return pl.ds(self.first, CONSUMERS * ROWS), pl.ds(i * DEPTH, DEPTH)

    def store(self, out_ref, smem, me, *where) -> None:
        """Copies a consumer's rows of the tile from shared memory to out_ref, in pieces of powers of two.

        `where` is the rest of the index, the columns last. Columns past the end of the array's last dimension are not
        written: TMA drops them. A piece of one row is cut at that end here, because Mosaic copies a contiguous piece
        without a tiled TMA descriptor, and such a copy is only bounded by the end of the array.
        """
        first = self.first + me * ROWS
        row, stop = jnp.maximum(self.start, first), jnp.minimum(self.stop, first + ROWS)
        size = jnp.maximum(stop - row, 0)
        *between, columns = where
        whole = out_ref.shape[-1] % columns.size == 0
        inside = jnp.minimum(columns.size, out_ref.shape[-1] - columns.start)

        def copy(row, length: int, start, width: int) -> None:
            piece = smem.at[me, pl.ds(row - first, length), pl.ds(start, width)]
            of_out = (pl.ds(row, length), *between, pl.ds(columns.start + start, width))
            plgpu.copy_smem_to_gmem(piece, out_ref.at[of_out])

        for length in (64, 32, 16, 8, 4, 2, 1):

            @pl.when((size & length) != 0)
            def _store(row=row, length=length):
                if length > 1 or whole:
                    copy(row, length, 0, columns.size)
                else:
                    pl.loop(0, lax.div(inside, jnp.int32(DEPTH)))(lambda i: copy(row, 1, i * DEPTH, DEPTH))

            row += size & length


def _product_kernel(x_ref, w_ref, tiles, out_ref, x_smem, w_smem, out_smem, ready, free, *, transposed, blocks):
    tile = Tile.of_program(tiles, w_ref.shape[0], out_ref.shape[1], x_ref.shape[1], blocks)
    columns = pl.ds(tile.column, blocks.columns)
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        depth = lambda i: pl.ds(i * DEPTH, DEPTH)
        place = lambda i: (columns, depth(i)) if transposed else (depth(i), columns)
        matrix = lambda i: w_ref.at[(tile.expert, *place(i))]
        fill(tile, blocks, Stream(ready, free, [(lambda i: x_ref.at[tile.rows(i)], x_smem), (matrix, w_smem)]))

    @pl.when(me < CONSUMERS)
    def _consumer_kernel():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        matrix = lambda slot: w_smem.at[slot].transpose((1, 0)) if transposed else w_smem.at[slot]

        def product(acc):
            multiply(tile, x_smem, [matrix], ready, free, me, [acc], blocks)
            return acc[...]

        acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, blocks.columns), jnp.float32))
        out_smem.at[me][...] = acc.astype(out_ref.dtype)
        plgpu.commit_smem()
        tile.store(out_ref, out_smem, me, columns)
        plgpu.wait_smem_to_gmem(0)
