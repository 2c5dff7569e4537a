"""Cost model of the DP-SGD kernels, and the choice between the two algorithms for a ghost norm."""

import jax
import numpy as np
from jax.core import Tracer

from ..op import Cost


TILE = 64  # the fewest rows of a tile of pairs


def pairs_are_fewer(T: int, D: int, F: int) -> bool:
    """Whether an example's norm takes fewer flops by pairs of rows (Gram matrices) than by the matrix A^T G.

    ||A^T G||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>. A pair takes 2 (D + F) flops. Half of the pairs are enough, because
    (t, s) and (s, t) are equal. In tiles of n rows, with whole tiles on the diagonal, T (T + n) / 2 pairs are computed:

        by pairs   T (T + n) (D + F)
        by matrix  2 T D F

    So pairs take fewer flops if (T + n) (D + F) < 2 D F, that is if the harmonic mean of D and F is above T + n. The
    smallest tile is taken for n. Memory is no criterion, because neither algorithm writes its products to memory. The
    result is true for all matrices of DiT-XL/2, which are at least 1152 wide, at 256 and at 1,024 tokens, and for none
    at 4,096; it is never true if D or F is at most T / 2, as in LoRA.
    """
    return (T + TILE) * (D + F) < 2 * D * F


def ghost_norm_sq(a, g, groups, *, bias) -> Cost:
    """The pairs t <= s, each 2 (D + F) flops, or the matrix, 2 T D F, if fewer; and the lengths of the rows.

    Reads each array, writes 2 B numbers.

    If the values of the groups are known, only pairs within a group are counted; else all rows count as one group.
    """
    del bias  # its flops are a fraction 1 / (D + F) of the others
    (B, T, D), F = a.shape, g.shape[2]
    rows, pairs = _rows_and_pairs(groups, B, T)
    matrix = 2 * rows * D * F
    lengths = 2 * rows * (D + F)
    moved = _size(a, g) + _size(*([] if groups is None else [groups])) + 8 * B
    return Cost(min(2 * pairs * (D + F), matrix) + lengths, moved)


def clip_reduce(a, g, c) -> Cost:
    """2 B T D F; reads each array, writes the matrix in float32."""
    (B, T, D), F = a.shape, g.shape[2]
    return Cost(2 * B * T * D * F, _size(a, g, c) + 4 * D * F)


def part(flops: int, *moved) -> Cost:
    """The cost of one kernel: `moved` are the arrays that it reads or writes once."""
    return Cost(flops, _size(*moved))


def _rows_and_pairs(groups, B: int, T: int) -> tuple[int, int]:
    """(the number of rows that are not padding, the number of pairs t <= s within an example and a group)."""
    if groups is None or isinstance(groups, Tracer | jax.ShapeDtypeStruct):
        return B * T, B * T * (T + 1) // 2
    sizes = np.concatenate([np.unique(row[row >= 0], return_counts=True)[1] for row in np.asarray(groups)])
    return int(sizes.sum()), int((sizes * (sizes + 1) // 2).sum())


def _size(*arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
