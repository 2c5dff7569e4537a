"""What is particular to decoding: its definition, what of a cache is read, how it is split, and what is refused.

The oracle is a float64 softmax in NumPy that shares no line with the package. A result passes when
`max|result - oracle| <= 2 max|plain - oracle| + floor`, `plain` being the definition at the same dtype and the floor
two ulps of that dtype at the largest sum of terms' sizes (test_ops.py).
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st
from jax.experimental import pallas as pl

from kernels_pallas import (
    DECODE_ATTENTION,
    PAGED_DECODE_ATTENTION,
    backend,
    decode_attention,
    hardware,
    paged_decode_attention,
)
from kernels_pallas.decode import cost, triton


pytestmark = pytest.mark.recorded


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


LENGTHS = (77, 0, 1, 40)
EITHER = pytest.mark.parametrize("page", [None, 16], ids=["one cache", "pages"])


def random(lengths, S, K, group, H, *, page=None, dtype=jnp.float32, seed=0):
    """(q, k, v, lengths), or (q, k, v, table, lengths): pages in a random order, one more than are in the table."""
    B = len(lengths)
    rows = (B, S) if page is None else (B * -(-S // page) + 1, page)
    shapes = [(B, K * group, H), (*rows, K, H), (*rows, K, H)]
    rng = np.random.default_rng(seed)  # not jax.random, which compiles for each shape
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes)
    order = rng.permutation(rows[0])[1:].reshape(B, -1) if page else None
    table = () if order is None else (jnp.asarray(order, jnp.int32),)
    return q, k, v, *table, jnp.array(lengths, jnp.int32)


def run(arrays, implementation="triton", **static):
    """Of either op, by the number of arrays; a Pallas kernel is interpreted, and compiled in haste."""
    op = decode_attention if len(arrays) == 4 else paged_decode_attention
    with backend.interpret_mode():
        lowered = jax.jit(functools.partial(op, implementation=implementation, **static)).lower(*arrays)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*arrays)


def caches(arrays) -> list[np.ndarray]:
    """k and v of (B, S, K, H), whatever the arrays: pages put one after the other."""
    _, k, v, *table, _ = (np.asarray(x) for x in arrays)
    return [np.concatenate(x[table[0]].swapaxes(0, 1), axis=1) if table else x for x in (k, v)]


def by_hand(arrays, *, scale=None, softcap=None, dtype=np.float64):
    """(out, the sums of the sizes of its terms), one query head at a time."""
    q, lengths = np.asarray(arrays[0], dtype), np.asarray(arrays[-1])
    k, v = (x.astype(dtype) for x in caches(arrays))
    out, size = np.zeros_like(q), np.zeros_like(q)
    for b, n in np.ndindex(*q.shape[:2]):
        if lengths[b]:
            of_keys = (b, slice(lengths[b]), n // (q.shape[1] // k.shape[2]))
            scores = k[of_keys] @ q[b, n] * dtype(q.shape[2] ** -0.5 if scale is None else scale)
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[b, n], size[b, n] = weights @ v[of_keys], weights @ np.abs(v[of_keys])
    return out, size


def check(arrays, got, **static):
    truth, size = by_hand(arrays, **static)
    plain = run(arrays, "xla", **static)
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    error, usual = (np.abs(np.asarray(x, np.float64) - truth).max() for x in (got, plain))
    allowed = 2 * usual + 2 * float(jnp.finfo(got.dtype).eps) * size.max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def assert_same_bits(a, b):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Right.


@EITHER
@pytest.mark.parametrize("static", [{}, {"scale": -0.5}, {"softcap": 1.5}], ids=str)
def test_reference_is_softmax_attention(page, static):
    """Held to the float64 softmax as closely as that softmax itself in float32."""
    arrays = random(LENGTHS, 77, 2, 3, 24, page=page)
    truth, size = by_hand(arrays, **static)
    usual, _ = by_hand(arrays, dtype=np.float32, **static)
    error, usual_error = (
        np.abs(np.asarray(x, np.float64) - truth).max() for x in (run(arrays, "xla", **static), usual)
    )
    assert error <= 2 * usual_error + 2 * float(jnp.finfo(jnp.float32).eps) * size.max()


# No shrinking: each example compiles for seconds, and one that fails is small enough to read.
@pytest.mark.slow("one program for each of fourteen drawn shapes")
@settings(max_examples=14, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    data=st.data(),
    S=st.integers(1, 200),
    B=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.sampled_from(range(8, 137, 8)),
    page=st.sampled_from([None, 16, 32, 128]),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_triton_takes_every_shape_and_repeats_itself(data, S, B, heads, width, page, scale, softcap, dtype):
    lengths = data.draw(st.tuples(*[st.one_of(st.sampled_from([0, 1, S]), st.integers(0, S))] * B))
    arrays = random(lengths, S, *heads, width, page=page, dtype=dtype)
    got = run(arrays, scale=scale, softcap=softcap)
    check(arrays, got, scale=scale, softcap=softcap)
    assert_same_bits(got, run(arrays, scale=scale, softcap=softcap))


@pytest.mark.parametrize("splits", [1, 3, 40])
def test_any_number_of_splits_gives_the_same(splits):
    """40: more than there are tiles."""
    arrays = random((200, 0, 1, 130), 200, 2, 2, 72, dtype=jnp.bfloat16)
    with mock.patch.object(triton, "_splits", lambda pairs, tiles: splits):
        check(arrays, run(arrays))


def test_large_scores_are_kept_apart():
    """Scores past a hundred, whose exponentials overflow unless the maximum is taken off first."""
    q, *rest = random((300, 5), 300, 1, 2, 64)
    check((30 * q, *rest), run((30 * q, *rest)))


def test_pages_are_the_cache_to_the_bit():
    """Where keys lie changes nothing. Two examples may own a page together, as those with one beginning do."""
    arrays = random((96, 50), 96, 2, 2, 64, page=32, dtype=jnp.bfloat16)
    q, k, v, table, lengths = arrays
    shared = (q, k, v, table.at[1, 0].set(table[0, 0]), lengths)
    for paged in (arrays, shared):
        assert_same_bits(run(paged), run((q, *map(jnp.asarray, caches(paged)), lengths)))


@EITHER
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_no_key_gives_zero(page, implementation):
    out = run(random(LENGTHS, 77, 1, 2, 16, page=page), implementation)
    assert not np.any(out[1]) and np.all(np.any(out[np.array([0, 2, 3])], axis=-1))


@EITHER
def test_lengths_not_known_end_at_the_capacity(page):
    """A kernel must not run past the cache because a counter did."""
    *arrays, lengths = random((80, 80), 80, 1, 2, 16, page=page)
    for implementation in ("xla", "triton"):
        wanted = run((*arrays, lengths), implementation)
        assert_same_bits(run((*arrays, lengths + 7), implementation), wanted)


@EITHER
def test_gradient_is_that_of_the_definition(page):
    """And nothing where nothing was read."""
    *arrays, lengths = poisoned(random((40, 0, 9), 77, 1, 2, 16, page=page))
    table = arrays[3:]
    op = decode_attention if page is None else paged_decode_attention
    d_out = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def gradients(implementation):
        with backend.interpret_mode():
            function = lambda *qkv: op(*qkv, *table, lengths, implementation=implementation)
            return jax.vjp(function, *arrays[:3])[1](d_out)

    for mine, theirs in zip(gradients("triton"), gradients("xla"), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.all(np.isfinite(mine)) and np.any(mine)
    d_k = caches((arrays[0], *gradients("xla")[1:], *table, lengths))[0]
    assert not np.any(d_k[0, 40:]) and not np.any(d_k[1]) and not np.any(d_k[2, 9:]) and np.any(d_k[2, :9])


# What is read.


def poisoned(arrays):
    """NaN wherever there is no key below a length, and so in pages that nobody owns."""
    q, k, v, *table, lengths = arrays
    owned = np.zeros(k.shape[:2], bool)
    W = k.shape[1]
    for b, length in enumerate(np.asarray(lengths)):
        for s in range(length):
            owned[int(table[0][b, s // W]) if table else b, s % W] = True
    k, v = (jnp.asarray(np.where(owned[:, :, None, None], x, np.array(np.nan, x.dtype))) for x in (k, v))
    return q, k, v, *table, lengths


@EITHER
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_past_a_length_may_be_anything(page, implementation, dtype):
    arrays = random(LENGTHS, 77, 2, 2, 40, page=page, dtype=dtype)
    assert_same_bits(run(poisoned(arrays), implementation), run(arrays, implementation))


@pytest.mark.parametrize("anything", [-1, 2**31 - 1])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_entries_past_a_length_may_be_anything(anything, implementation):
    q, k, v, table, lengths = arrays = poisoned(random(LENGTHS, 77, 2, 2, 16, page=16))
    needed = jnp.arange(table.shape[1])[None] * 16 < lengths[:, None]
    spoiled = q, k, v, jnp.where(needed, table, jnp.int32(anything)), lengths
    assert not np.all(needed)
    assert_same_bits(run(spoiled, implementation), run(arrays, implementation))


@EITHER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_key_below_a_length_is_read_once_and_no_other(page, dtype):
    """By the addresses and masks of the kernel's own loads: traffic is what the cost model says."""
    K, (*arrays, lengths) = 2, random((77, 0, 1, 70), 96, 2, 3, 40, page=page, dtype=dtype)
    reads, entries, empty = [], [], []
    load = triton.pltriton.load

    def spy(at, *, mask, other):
        indices = at.transforms[-1].indices
        if len(indices) == 3 and getattr(indices[0], "ndim", 0) == 2:  # keys or values: row, head, column
            jax.debug.callback(lambda *where: reads.extend(read_at(*where)), *indices, mask)
        elif page and at.ref.shape == arrays[3].shape and at.ref.dtype == jnp.int32:
            jax.debug.callback(lambda *where: entries.extend(read_at(*where)), *indices, mask)
        return load(at, mask=mask, other=other)

    def read_at(*indices_and_mask):
        *indices, mask = (np.asarray(x) for x in np.broadcast_arrays(*indices_and_mask))
        empty.append(not np.any(mask))
        return zip(*(i[mask].tolist() for i in indices), strict=True)

    with mock.patch.object(triton.pltriton, "load", spy):
        run((*arrays, lengths))
    jax.effects_barrier()
    W = page or 96
    below = [(b, s) for b, length in enumerate(lengths.tolist()) for s in range(length)]
    row = lambda b, s: (int(arrays[3][b, s // W]) if page else b) * W + s % W
    wanted = [(row(b, s), kv_head, column) for b, s in below for kv_head in range(K) for column in range(40)]
    assert sorted(reads) == sorted(2 * wanted)  # once as keys, once as values
    assert not any(empty)  # no program walks past its keys
    assert set(entries) == ({(b, s // W) for b, s in below} if page else set())


# How it is split.


def blocks_on(gpu: hardware.Hardware, B, K, S, **options):
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, platform="gpu", num_cores=gpu.cores)
    q = jax.ShapeDtypeStruct((B, 4 * K, 128), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return triton.blocks_for(q, K, S, **{"paged": False} | options)


@pytest.mark.parametrize("gpu", [hardware.H200, hardware.A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("B, K, S", [(1, 8, 32768), (1, 4, 32768), (8, 8, 32768), (8, 8, 4096), (3, 8, 8192)])
def test_few_requests_fill_the_gpu(gpu, B, K, S):
    """Its waves of programs are full to seven eighths at least."""
    programs, slots = B * K * blocks_on(gpu, B, K, S).splits, triton.PROGRAMS_A_CORE * gpu.cores
    assert 7 / 8 * -(-programs // slots) <= programs / slots


def test_many_requests_are_not_split():
    assert blocks_on(hardware.H200, 512, 8, 4096).splits == 1


@pytest.mark.parametrize("S", [1, 63, 64, 65, 1000])
def test_no_split_is_without_a_tile(S):
    assert 1 <= blocks_on(hardware.H200, 1, 1, S).splits <= -(-S // 64)


# What it costs.


@EITHER
def test_cost_counts_what_the_lengths_leave(page):
    arrays = random(LENGTHS, 77, 2, 3, 24, page=page, dtype=jnp.bfloat16)
    work = (cost.forward if page is None else cost.paged_forward)(*arrays, scale=None, softcap=None)
    keys, entries = sum(LENGTHS), sum(-(-length // 16) for length in LENGTHS)
    assert work.flops == 4 * 6 * 24 * keys
    assert work.transcendentals == 6 * keys
    q, lengths = arrays[0], arrays[-1]
    assert work.bytes == 2 * keys * 2 * 24 * 2 + 2 * q.nbytes + lengths.nbytes + (0 if page is None else 4 * entries)


@EITHER
def test_cost_of_lengths_that_are_not_known_is_the_capacity(page):
    arrays = random(LENGTHS, 77, 2, 3, 24, page=page)
    full = (*arrays[:-1], jnp.full(4, 77 if page is None else 80, jnp.int32))
    shapes = jax.eval_shape(lambda *arrays: arrays, *arrays)
    counted = cost.forward if page is None else cost.paged_forward
    assert counted(*shapes) == counted(*full)


@EITHER
def test_a_longer_cache_compiles_nothing_anew(page):
    """Outside jit the lengths are known when the kernel is called; a later call does not even trace it."""
    *arrays, _ = random((0,), 16, 1, 1, 16, page=page)
    op, pallas_call, estimates = decode_attention if page is None else paged_decode_attention, pl.pallas_call, []

    def spy(kernel, *, cost_estimate, **options):
        estimates[-1].append(cost_estimate)
        return pallas_call(kernel, cost_estimate=cost_estimate, **options)

    with backend.interpret_mode(), mock.patch.object(pl, "pallas_call", spy):
        for length in (1, 3, 16):  # JAX traces a first program twice
            estimates.append([])
            op(*arrays, jnp.array([length], jnp.int32), implementation="triton")
    assert estimates[0] and not estimates[2]


# What is refused.


def refusal(op, arrays, **options):
    with pytest.raises(ValueError) as refused:
        op(*arrays, **options)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(op.__name__)
    return str(refused.value)


CACHE = {
    "wanted q (B, N, H) and k_cache and v_cache (B, S, K, H), got (2, 1, 4, 8), ": {0: jnp.zeros((2, 1, 4, 8))},
    "k_cache and v_cache must have one shape (B, S, K, H), got": {2: jnp.zeros((2, 6, 2, 8))},
    "q and k_cache must have one batch B, got q (3, 4, 8)": {0: jnp.zeros((3, 4, 8)), 3: jnp.zeros(3, jnp.int32)},
    "must have one head width H, got 16 and 8": {0: jnp.zeros((2, 4, 16))},
    "query heads must be a multiple of key heads, got N = 3 and K = 2": {0: jnp.zeros((2, 3, 8))},
    "must have one dtype, got bfloat16, float32 and float32; cast them": {0: jnp.zeros((2, 4, 8), jnp.bfloat16)},
    "lengths must be one number per example, (B,) = (2,), got (3,)": {3: jnp.zeros(3, jnp.int32)},
    "lengths must be integers, got float32; cast them to int32": {3: jnp.zeros(2)},
    "lengths must be from 0 to S = 5, got 6 of example 1": {3: jnp.array([5, 6])},
    "lengths must be from 0 to S = 5, got -1 of example 0": {3: jnp.array([-1, 6])},
}
PAGES = {
    "the page size must be a power of two, W >= 16, got W = 24": {1: (3, 24, 2, 8), 2: (3, 24, 2, 8)},
    "W >= 16, got W = 8": {1: (3, 8, 2, 8), 2: (3, 8, 2, 8)},
    "k_pages and v_pages must have one shape (P, W, K, H), got": {2: (4, 16, 2, 8)},
    "block_table must be (B, J), with B = 2, got (3, 2)": {3: jnp.zeros((3, 2), jnp.int32)},
    "block_table must be integers, got float32": {3: jnp.zeros((2, 2))},
    "lengths must be from 0 to J W = 32, got 33 of example 0": {4: jnp.array([33, 0])},
    "block_table must hold page numbers 0 to 2 below the lengths, got 3 at [0, 1]": {3: jnp.array([[0, 3], [0, 9]])},
}
OPTIONS = {
    "scale must be a finite number, got nan": {"scale": float("nan")},
    "softcap must be a finite number above 0, got 0": {"softcap": 0},
    "no implementation='cuda'; choose from xla, triton": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", CACHE)
def test_a_cache_that_does_not_fit_is_refused_in_one_line(message, unchecked_arrays):
    arrays = [jnp.zeros((2, 4, 8)), jnp.zeros((2, 5, 2, 8)), jnp.zeros((2, 5, 2, 8)), jnp.zeros(2, jnp.int32)]
    for i, array in CACHE[message].items():
        arrays[i] = array
    assert message in refusal(decode_attention, arrays)


@pytest.mark.parametrize("message", PAGES)
def test_pages_that_do_not_fit_are_refused_in_one_line(message, unchecked_arrays):
    arrays = [jnp.zeros((2, 4, 8)), *[jnp.zeros((3, 16, 2, 8))] * 2, jnp.zeros((2, 2), jnp.int32), jnp.array([32, 3])]
    for i, array in PAGES[message].items():
        arrays[i] = jnp.zeros(array) if isinstance(array, tuple) else array
    assert message in refusal(paged_decode_attention, arrays)


@EITHER
@pytest.mark.parametrize("message", OPTIONS)
def test_options_that_make_no_sense_are_refused_in_one_line(message, page, unchecked_arrays):
    op = decode_attention if page is None else paged_decode_attention
    assert message in refusal(op, random((3, 2), 16, 1, 1, 8, page=page), **OPTIONS[message])


@pytest.mark.parametrize(
    "width, group, why",
    [
        (12, 1, "multiple of 8 up to 256, got 12"),
        (264, 1, "up to 256, got 264"),
        (8, 65, "at most 64 query heads per key head, got 65"),
    ],
)
def test_triton_says_what_it_does_not_take(width, group, why):
    for page, op in ((None, DECODE_ATTENTION), (16, PAGED_DECODE_ATTENTION)):
        arrays = random((1,), 16, 1, group, width, page=page)
        with backend.interpret_mode(), pytest.raises(NotImplementedError, match=why):
            op(*arrays, scale=None, softcap=None, implementation="triton")
