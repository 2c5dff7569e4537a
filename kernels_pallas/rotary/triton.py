"""Fused QK-norm and RoPE in Pallas-Triton: a program has a tile of tokens of one key head and its query heads.

The first and the second elements of the pairs are loaded as separate tiles, so that a rotation needs no communication
between threads. The backward recomputes the statistics from whole heads, so there are no residuals beside the inputs.
Each program writes its partial sums of the gradients of the weights; a second stage adds them in a fixed order, without
atomics.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..pallas.triton import run
from . import cost


MAX_WIDTH = 512
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a program: it holds two of these in registers, the first and the second elements of the pairs."""

    tokens: int
    half: int  # half of the head width, padded to a power of two for Triton
    num_warps: int
    num_stages: int = 3


def tile_for(tokens: int, width: int) -> Tile:
    """A tile with eight elements per thread of each half: one 16-byte load of bfloat16."""
    half = max(pl.next_power_of_2(width // 2), 8)
    rows = min(max(2048 // half, 1), pl.next_power_of_2(tokens))
    return Tile(rows, half, num_warps=min(max(rows * half // (8 * 32), 1), 8))


def unsupported(qkv, q_weight, k_weight, rotation, *, interleaved, eps) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del rotation, interleaved, eps
    for array in (qkv, q_weight, k_weight):
        if array is not None and array.dtype.name not in DTYPES:
            return f"needs dtypes among {', '.join(DTYPES)}, got {array.dtype}"
    if not 8 <= qkv.shape[-1] <= MAX_WIDTH:
        return f"needs a head width of 8 to {MAX_WIDTH}, got {qkv.shape[-1]}"
    return backend.why_not_triton()


def forward(qkv, q_weight, k_weight, rotation, *, interleaved, eps):
    """((q, k, v), residuals); the residuals are the inputs, without qkv if there is no normalisation."""
    B, T, K, M, H = qkv.shape
    tile, pairs = tile_for(T, H), functools.partial(_pairs, interleaved=interleaved)
    heads = lambda count: pairs(jax.ShapeDtypeStruct((B, T, count, H), qkv.dtype))
    out = run(
        functools.partial(_forward_kernel, eps=eps, tile=tile),
        *(pairs(qkv), pairs(q_weight), pairs(k_weight), rotation),
        name="qk_norm_rope_forward",
        programs=B * K * pl.cdiv(T, tile.tokens),
        blocks=tile,
        out_shape=(heads(K * (M - 2)), heads(K), heads(K)),
        work=cost.forward(qkv, q_weight, k_weight, rotation, interleaved=interleaved, eps=eps),
    )
    out = tuple(x.reshape(*x.shape[:3], H) for x in out)
    return out, (None if q_weight is None else qkv, q_weight, k_weight, rotation)


def backward(residuals, d_out, *, interleaved, eps):
    """(d_qkv, d_q_weight, d_k_weight, None), each in its input's dtype."""
    qkv, q_weight, k_weight, rotation = residuals
    (B, T, N, H), K = d_out[0].shape, d_out[1].shape[2]
    tile, pairs = tile_for(T, H), functools.partial(_pairs, interleaved=interleaved)
    packed = jax.ShapeDtypeStruct((B, T, K, N // K + 2, H), d_out[0].dtype)
    programs = B * K * pl.cdiv(T, tile.tokens)
    sums = None if qkv is None else jax.ShapeDtypeStruct((programs, H), jnp.float32)
    d_qkv, *d_weights = run(
        functools.partial(_backward_kernel, eps=eps, tile=tile),
        *(pairs(qkv), pairs(q_weight), pairs(k_weight), rotation, *map(pairs, d_out)),
        name="qk_norm_rope_backward",
        programs=programs,
        blocks=tile,
        out_shape=(pairs(packed), pairs(sums), pairs(sums)),
        work=cost.backward(packed, q_weight, k_weight, rotation, interleaved=interleaved, eps=eps),
    )
    summed = [None if d is None else d.sum(axis=0).reshape(H).astype(w.dtype)
              for d, w in zip(d_weights, (q_weight, k_weight), strict=True)]  # fmt: skip
    return d_qkv.reshape(packed.shape), *summed, None


def _pairs(array, interleaved: bool):
    """The array with its head dim reshaped to (2, H/2), or to (H/2, 2) if interleaved; no copy. None stays None."""
    if array is None:
        return None
    *front, H = array.shape
    shape = (*front, H // 2, 2) if interleaved else (*front, 2, H // 2)
    return jax.ShapeDtypeStruct(shape, array.dtype) if isinstance(array, jax.ShapeDtypeStruct) else array.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Place:
    """The index and masks of a program's tokens of one example, with all pairs of a head."""

    example: Any
    tokens: Any
    token_mask: Any  # (tokens,)
    half: Any
    half_mask: Any  # (half,)

    @classmethod
    def of(cls, example, start, T: int, half: int, tile: Tile) -> "Place":
        """The tokens from `start` on."""
        token_mask = start + jnp.arange(tile.tokens, dtype=jnp.int32) < T
        half_mask = jnp.arange(tile.half, dtype=jnp.int32) < half
        return cls(example, pl.ds(start, tile.tokens), token_mask, pl.ds(jnp.int32(0), tile.half), half_mask)

    @property
    def mask(self):
        return self.token_mask[:, None] & self.half_mask[None, :]

    def load(self, ref, *head) -> Any:
        """Loads the pairs of one head of every token, as float32; zero outside."""
        refs = self.elements(ref, self.example, self.tokens, *head)
        return tuple(pltriton.load(at, mask=self.mask, other=0.0).astype(jnp.float32) for at in refs)

    def store(self, ref, pairs, *head) -> None:
        """Stores the pairs of one head of every token."""
        for at, value in zip(self.elements(ref, self.example, self.tokens, *head), pairs, strict=True):
            pltriton.store(at, value.astype(ref.dtype), mask=self.mask)

    def weights(self, ref) -> Any:
        """Loads the weights of the first and of the second elements, as rows; None without weights."""
        if ref is None:
            return None
        load = lambda at: pltriton.load(at, mask=self.half_mask, other=0.0)
        return tuple(load(at).astype(jnp.float32)[None, :] for at in self.elements(ref))

    def elements(self, ref, *front) -> Any:
        """Views of the first and of the second elements of the pairs, in an array that `_pairs` returned."""
        each = (jnp.int32(0), jnp.int32(1))
        return tuple(ref.at[*front, self.half, i] if ref.shape[-1] == 2 else ref.at[*front, i, self.half] for i in each)

    def angles(self, rotation) -> Any:
        """Loads (cos, sin) of every token; None without a rotation."""
        if rotation is None:
            return None
        example = self.example if rotation.cos.shape[0] > 1 else jnp.int32(0)
        return tuple(pltriton.load(ref.at[example, self.tokens, self.half], mask=self.mask, other=0.0)
                     for ref in (rotation.cos, rotation.sin))  # fmt: skip


def _start(T, K, half, tile):
    """(place, key head) of this program. Consecutive programs have the key heads of the same tokens, which are
    contiguous in memory."""
    program, tiles = pl.program_id(0), pl.cdiv(T, tile.tokens)
    key_head, tile_index, example = program % K, program // K % tiles, program // (K * tiles)
    return Place.of(example, tile_index * tile.tokens, T, half, tile), key_head


def _rstd(pairs, H, eps):
    first, second = pairs
    return jax.lax.rsqrt((jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)) / H + eps)[:, None]


def _turn(pairs, angles, direction: int):
    """Rotates the pairs by the angles (direction 1) or by their negatives (-1)."""
    if angles is None:
        return pairs
    (a, b), (cos, sin) = pairs, angles
    return (a * cos - b * sin, b * cos + a * sin) if direction > 0 else (a * cos + b * sin, b * cos - a * sin)


def _forward_kernel(
    qkv_ref, q_weight_ref, k_weight_ref, rotation, q_ref, k_ref, v_ref, *, eps, tile
):  # fmt: skip
    _, T, K, M, *pair = qkv_ref.shape
    H = pair[0] * pair[1]
    place, key_head = _start(T, K, H // 2, tile)
    angles = place.angles(rotation)

    def prepare(member, weight_ref, out_ref, head):
        pairs, weights = place.load(qkv_ref, key_head, member), place.weights(weight_ref)
        if weights is not None:
            rstd = _rstd(pairs, H, eps)
            pairs = tuple(x * rstd * weight for x, weight in zip(pairs, weights, strict=True))
        place.store(out_ref, _turn(pairs, angles, 1), head)

    def query(member, _):
        prepare(member, q_weight_ref, q_ref, key_head * (M - 2) + member)

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(M - 2), query, None)
    prepare(jnp.int32(M - 2), k_weight_ref, k_ref, key_head)
    place.store(v_ref, place.load(qkv_ref, key_head, jnp.int32(M - 1)), key_head)


def _backward_kernel(
    qkv_ref, q_weight_ref, k_weight_ref, rotation, d_q_ref, d_k_ref, d_v_ref,
    d_qkv_ref, d_q_weight_ref, d_k_weight_ref, *, eps, tile,
):  # fmt: skip
    _, T, K, M, *pair = d_qkv_ref.shape
    H = pair[0] * pair[1]
    place, key_head = _start(T, K, H // 2, tile)
    angles = place.angles(rotation)

    def back(member, weight_ref, d_ref, head):
        """Writes the gradient of one head; returns its contribution to the gradient of the weights."""
        d_pairs, weights = _turn(place.load(d_ref, head), angles, -1), place.weights(weight_ref)
        if weights is None:
            place.store(d_qkv_ref, d_pairs, key_head, member)
            return ()
        pairs = place.load(qkv_ref, key_head, member)
        rstd = _rstd(pairs, H, eps)
        x_hat = [x * rstd for x in pairs]
        g = [d * weight for d, weight in zip(d_pairs, weights, strict=True)]
        mean = jnp.sum(g[0] * x_hat[0] + g[1] * x_hat[1], axis=1)[:, None] / H
        place.store(d_qkv_ref, [rstd * (a - b * mean) for a, b in zip(g, x_hat, strict=True)], key_head, member)
        return tuple(jnp.sum(d * x, axis=0) for d, x in zip(d_pairs, x_hat, strict=True))

    def query(member, sums):
        terms = back(member, q_weight_ref, d_q_ref, key_head * (M - 2) + member)
        return tuple(a + b for a, b in zip(sums, terms, strict=True))

    zeros = () if q_weight_ref is None else (jnp.zeros(tile.half, jnp.float32),) * 2
    of_query = jax.lax.fori_loop(jnp.int32(0), jnp.int32(M - 2), query, zeros)
    of_key = back(jnp.int32(M - 2), k_weight_ref, d_k_ref, key_head)
    place.store(d_qkv_ref, place.load(d_v_ref, key_head), key_head, jnp.int32(M - 1))
    for ref, sums in ((d_q_weight_ref, of_query), (d_k_weight_ref, of_key)):
        for at, sum_ in zip(place.elements(ref, pl.program_id(0)), sums, strict=True) if sums else ():
            pltriton.store(at, sum_, mask=place.half_mask)
