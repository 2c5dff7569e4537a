"""Work that no implementation avoids, and which of two ways to a norm is less of it."""

import jax
import numpy as np
from jax.core import Tracer

from ..op import Cost


TILE = 64  # rows of a tile of pairs, at least


def pairs_are_fewer(T: int, D: int, F: int) -> bool:
    """Whether an example's norm takes less work by pairs of rows than by the matrix A^T G.

    ||A^T G||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>. A pair is 2 (D + F) flops, and half of them are enough, (t, s) and
    (s, t) being equal. In tiles of n rows, those on the diagonal whole, T (T + n) / 2 pairs are computed:

        by pairs   T (T + n) (D + F)
        by matrix  2 T D F

    so pairs are fewer where (T + n) (D + F) < 2 D F: where the harmonic mean of D and F is above T + n. For n the
    smallest tile is taken. Neither way keeps in memory what it squares, so memory does not enter. It is true of all
    matrices of DiT-XL/2, 1152 wide and more, at 256 and at 1,024 tokens, and of none at 4,096; never of one whose D
    or F is at most T / 2, as LoRA's are.
    """
    return (T + TILE) * (D + F) < 2 * D * F


def ghost_norm_sq(a, g, groups, *, bias) -> Cost:
    """The pairs t <= s, each 2 (D + F) flops, or the matrix, 2 T D F: what is less. Reads each array, writes B numbers.

    Where the groups' values are known only pairs of one group count; else all rows count as one group.
    """
    del bias  # its terms are a (D + F)-th of the rest
    (B, T, D), F = a.shape, g.shape[2]
    rows, pairs = _rows_and_pairs(groups, B, T)
    matrix = 2 * rows * D * F
    return Cost(min(2 * pairs * (D + F), matrix), _size(a, g) + _size(*([] if groups is None else [groups])) + 4 * B)


def clip_reduce(a, g, c) -> Cost:
    """2 B T D F; reads each array, writes the matrix in float32."""
    (B, T, D), F = a.shape, g.shape[2]
    return Cost(2 * B * T * D * F, _size(a, g, c) + 4 * D * F)


def part(flops: int, *moved) -> Cost:
    """Of one kernel: what it reads and writes once."""
    return Cost(flops, _size(*moved))


def _rows_and_pairs(groups, B: int, T: int) -> tuple[int, int]:
    """How many rows count, and how many pairs t <= s of one example and group."""
    if groups is None or isinstance(groups, Tracer | jax.ShapeDtypeStruct):
        return B * T, B * T * (T + 1) // 2
    sizes = np.concatenate([np.unique(row[row >= 0], return_counts=True)[1] for row in np.asarray(groups)])
    return int(sizes.sum()), int((sizes * (sizes + 1) // 2).sum())


def _size(*arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
