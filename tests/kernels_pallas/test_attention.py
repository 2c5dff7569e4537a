"""What is particular to attention: its definition, every mask and shape it takes, and what it refuses.

The oracle is a float64 softmax in NumPy, forward and backward by hand, that shares no line with the package.
A result passes when `max|result - oracle| <= 2 max|plain - oracle| + floor`: FlashAttention's own rule. `plain`
is attention as one writes it in jnp, and the floor two ulps of the inputs' dtype at the largest sum of terms'
sizes: where a softmax leaves one weight near 1, gradients are small differences of large terms, and a kernel
that has them from a rounded output, as FlashAttention does, rounds the terms.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

from kernels_pallas import FLASH_ATTENTION, AttentionMask, backend, flash_attention, merge_attention
from kernels_pallas.attention import cost, heads, triton


pytestmark = pytest.mark.recorded


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def dense(mask, B, T, S):
    """bool (B, T, S)."""
    return jnp.broadcast_to(jnp.ones((1, T, S), bool) if mask is None else mask.dense(), (B, T, S))


def by_hand(arrays, d_out, d_lse, *, mask, scale=None, softcap=None, dtype=np.float64):
    """([out, lse, d_q, d_k, d_v, d_sinks], the sums of the sizes of their terms), one query of one head at a time."""
    q, k, v, sinks, d_out, d_lse = (np.asarray(x, dtype) for x in (*arrays, d_out, d_lse))
    (B, T, N, H), S, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    scale = dtype(H**-0.5 if scale is None else scale)
    results, sizes = ([np.zeros_like(x) for x in (q, d_lse, q, k, v, sinks)] for _ in range(2))
    every_seen = np.asarray(dense(mask, B, T, S))
    for b, n, t in np.ndindex(B, N, T):
        seen = every_seen[b, t]
        of_query, of_keys = (b, t, n), (b, seen, n // group)
        scores = k[of_keys] @ q[of_query] * scale
        capped = scores if softcap is None else softcap * np.tanh(scores / softcap)
        slope = 1 if softcap is None else 1 - np.tanh(scores / softcap) ** 2
        top = max(capped.max(initial=-np.inf), sinks[n])
        if top == -np.inf:
            results[1][of_query] = -np.inf
            continue
        total = np.exp(capped - top).sum() + np.exp(sinks[n] - top)
        weights, sink_weight = np.exp(capped - top) / total, np.exp(sinks[n] - top) / total
        d_weights = v[of_keys] @ d_out[of_query]
        delta = weights @ d_weights - d_lse[of_query]
        size = np.abs(d_weights) + np.abs(weights @ d_weights) + np.abs(d_lse[of_query])
        d_scores, d_sizes = weights * (d_weights - delta) * slope * scale, weights * size * np.abs(scale)
        results[5][n] -= sink_weight * delta
        sizes[5][n] += sink_weight * size.max(initial=0)
        for (out, lse, d_q, d_k, d_v, _), d, sized in ((results, d_scores, lambda x: x), (sizes, d_sizes, np.abs)):
            out[of_query] = weights @ sized(v[of_keys])
            lse[of_query] = sized(top) + np.log(total)
            d_q[of_query] = d @ sized(k[of_keys])
            d_k[of_keys] += np.outer(d, sized(q[of_query]))
            d_v[of_keys] += np.outer(weights, sized(d_out[of_query]))
    return results, sizes


def random(B, T, S, K, group, H, dtype=jnp.float32, seed=0):
    """(q, k, v, sinks that take nothing), and cotangents of the output and of lse."""
    shapes = [(B, T, K * group, H), (B, S, K, H), (B, S, K, H), (B, T, K * group, H), (B, T, K * group)]
    keys = jax.random.split(jax.random.key(seed), 5)
    *qkv, d_out, d_lse = [jax.random.normal(key, s, jnp.float32) for key, s in zip(keys, shapes, strict=True)]
    return (*(x.astype(dtype) for x in qkv), jnp.full(K * group, -jnp.inf)), d_out.astype(dtype), d_lse


def run(attention, arrays, d_out, d_lse, *, mask, **static):
    """[out, lse, d_q, d_k, d_v, d_sinks] of an attention function; a Pallas kernel in it is interpreted."""
    compiled = program(attention, tuple(static.items()), *_signature((arrays, d_out, d_lse, mask)))
    return compiled(arrays, d_out, d_lse, mask)


@functools.lru_cache(maxsize=8)
def program(attention, static, tree, leaves):
    """`attention` and its gradients, compiled once for all masks of a shape."""

    def both(arrays, d_out, d_lse, mask):
        def of_arrays(q, k, v, sinks):
            return attention(q, k, v, sinks=sinks, mask=mask, return_lse=True, **dict(static))

        (out, lse), vjp = jax.vjp(of_arrays, *arrays)
        return [out, lse, *vjp((d_out, d_lse))]

    arguments = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    with backend.interpret_mode():
        lowered = jax.jit(both).lower(*arguments)
    # Unoptimised, for the compiler takes longer than the few runs.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def _signature(arguments):
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def plain(q, k, v, *, mask, sinks, return_lse, scale=None, softcap=None):
    """Attention as one writes it in jnp: products in the inputs' dtype, and a softmax in float32."""
    assert return_lse
    (B, T, N, H), S = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * (H**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    seen = dense(mask, B, T, S)[:, None]
    lowest = jnp.finfo(jnp.float32).min
    with_sink = jnp.concatenate(
        [jnp.where(seen, scores, lowest), jnp.broadcast_to(sinks[None, :, None, None], (B, N, T, 1))], axis=-1
    )
    weights = jax.nn.softmax(with_sink, axis=-1)[..., :-1]
    lse = jnp.swapaxes(jax.nn.logsumexp(with_sink, axis=-1), 1, 2)
    lse = jnp.where(lse <= lowest, -jnp.inf, lse)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(seen, weights, 0).astype(v.dtype), v), lse


REFERENCE = functools.partial(flash_attention, implementation="xla")
TRITON = functools.partial(flash_attention, implementation="triton")
NAMES = ("out", "lse", "d_q", "d_k", "d_v", "d_sinks")


def assert_as_good(got, usual, oracle, dtype):
    for name, mine, theirs, truth, size in zip(NAMES, got, usual, *oracle, strict=True):
        mine, theirs = (np.asarray(x, np.float64) for x in (mine, theirs))
        nothing = np.isneginf(truth)  # lse of a query that sees nothing
        assert np.all(np.isneginf(mine[nothing])) and not np.any(np.isneginf(mine[~nothing])), name
        error, usual_error = (
            np.abs(np.where(nothing, 0, x) - np.where(nothing, 0, truth)).max() for x in (mine, theirs)
        )
        allowed = 2 * usual_error + 2 * float(jnp.finfo(dtype).eps) * size.max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(attention, drawn, dtype, **static):
    assert_as_good(run(attention, *drawn, **static), run(plain, *drawn, **static), by_hand(*drawn, **static), dtype)


DOCUMENTS = np.repeat([0, 1, 2, -1], [30, 9, 33, 5])[None]
SPANS = np.repeat([-1, 0, 1, -1, 2, -1], [7, 17, 17, 2, 26, 8])[None]
PIECES = np.repeat([-1, 0, 1, -1, 2, -1, 3, 4, -1], [3, 10, 10, 7, 9, 2, 15, 15, 6])[None]
EVERY_MASK = {
    "none": lambda: None,
    "full": lambda: AttentionMask.full(77),
    "causal": lambda: AttentionMask.causal(77),
    "left window": lambda: AttentionMask.sliding_window(77, left=20),
    "centred window": lambda: AttentionMask.sliding_window(77, left=11, right=11),
    "padding": lambda: AttentionMask.padding(np.array([50, 0]), 77, query_lengths=np.array([61, 77])),
    "packed": lambda: AttentionMask.packed(DOCUMENTS),
    "packed, causal": lambda: AttentionMask.packed(DOCUMENTS, causal=True),
    "mixed": lambda: AttentionMask.mixed(SPANS),
    "unified": lambda: AttentionMask.unified(DOCUMENTS, PIECES, (PIECES == 0) | (PIECES == 3)),
}


@pytest.mark.parametrize("name", EVERY_MASK)
@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (72, "float32"), (72, "bfloat16"), (128, "float32")])
def test_triton_is_right_under_every_mask(name, width, dtype):
    """77 tokens, of which some see nothing under most masks; two query heads a key head."""
    mask = EVERY_MASK[name]()
    if mask is not None:
        mask = dataclasses.replace(mask, kind="custom")  # so that masks of one shape share a compiled program
    drawn = random(2 if name == "padding" else 1, 77, 77, 1, 2, width, dtype)
    check(TRITON, drawn, dtype, mask=mask)


DEFINED = {
    "full": ((2, 7, 19, 2, 1, 24), {"mask": None}),
    "grouped": ((1, 9, 9, 2, 3, 16), {"mask": AttentionMask.causal(9), "scale": 0.3}),
    "after a prefix": ((2, 5, 12, 1, 2, 8), {"mask": AttentionMask.causal(5, 12)}),
    "unseeing": ((2, 12, 5, 1, 2, 8), {"mask": AttentionMask.causal(12, 5), "scale": -0.5}),
    "capped": ((1, 9, 9, 2, 1, 16), {"mask": AttentionMask.sliding_window(9, left=3), "softcap": 1.5}),
}


@pytest.mark.parametrize("case", DEFINED)
def test_reference_is_softmax_attention(case):
    """Held to the float64 softmax as closely as that softmax itself in float32."""
    shape, static = DEFINED[case]
    drawn = random(*shape)
    narrow, oracle = (by_hand(*drawn, **static, dtype=dtype) for dtype in (np.float32, np.float64))
    assert_as_good(run(REFERENCE, *drawn, **static), narrow[0], oracle, jnp.float32)


@st.composite
def masked(draw, T, S):
    """Ranges in any order, and private tokens anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start, end = np.sort(rng.integers(0, S + 1, (2, 1, T)), axis=0)
    private = [rng.integers(0, 2, (1, n)).astype(np.int32) for n in (T, S)] if draw(st.booleans()) else []
    return AttentionMask(start.astype(np.int32), end.astype(np.int32), *private, num_keys=S)


# No shrinking: each example compiles for seconds, and one that fails is small enough to read.
@pytest.mark.slow("one program for each of sixteen drawn shapes")
@settings(max_examples=16, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    data=st.data(),
    lengths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    width=st.sampled_from(range(8, 137, 8)),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_triton_takes_every_shape(data, lengths, heads, width, scale, softcap, dtype):
    mask = data.draw(st.one_of(st.none(), masked(*lengths)))
    (q, k, v, sinks), d_out, d_lse = random(1, *lengths, *heads, width, dtype)
    sinks = jnp.where(jnp.arange(len(sinks)) % 2 == 0, sinks, 0.7)  # some heads with one, some without
    check(TRITON, ((q, k, v, sinks), d_out, d_lse), dtype, mask=mask, scale=scale, softcap=softcap)


def test_triton_keeps_large_scores_apart():
    """Scores past a hundred, whose exponentials overflow unless the maximum is taken off first."""
    (q, *rest), *cotangents = random(1, 50, 50, 1, 1, 64)
    check(TRITON, ((30 * q, *rest), *cotangents), jnp.float32, mask=AttentionMask.causal(50))


@pytest.mark.parametrize("attention", [REFERENCE, TRITON], ids=["xla", "triton"])
def test_queries_that_see_nothing_give_nothing_and_take_nothing(attention):
    """Whatever their cotangent: their own output and gradient are 0, and the keys' gradient is untouched."""
    T, S = 70, 33
    arrays, d_out, d_lse = random(1, T, S, 1, 2, 16)
    blind = (jnp.arange(T) < T - S)[None, :, None]
    mask = AttentionMask.causal(T, S)
    results = run(attention, arrays, d_out, d_lse, mask=mask)
    assert not np.any(results[0][:, : T - S]) and not np.any(results[2][:, : T - S])
    assert np.all(np.any(results[0][:, T - S :], axis=-1))
    louder = jnp.where(blind[..., None], 100 * d_out, d_out), jnp.where(blind, 100 * d_lse, d_lse)
    for mine, theirs in zip(results, run(attention, arrays, *louder, mask=mask), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_attention_over_two_halves_of_the_keys_merges_to_that_over_all(implementation):
    """And so do the gradients, through lse: what ring attention needs. Some queries see one half only, some none."""
    T, S = 40, 64
    (q, k, v, _), d_out, d_lse = random(2, T, S, 2, 2, 32)
    start, end = np.arange(T) * S // T, np.minimum(np.arange(T) * S // T + 9, S)
    end[::7] = start[::7]
    whole = AttentionMask(*(x.astype(np.int32)[None] for x in (start, end)), num_keys=S)

    def half(first):
        last = first + S // 2
        cut = (np.clip(x, first, last).astype(np.int32)[None] - first for x in (start, end))
        return AttentionMask(*cut, num_keys=S // 2)

    attend = functools.partial(flash_attention, return_lse=True, implementation=implementation)

    def merged(q, k, v):
        parts = [attend(q, k[:, s : s + S // 2], v[:, s : s + S // 2], mask=half(s)) for s in (0, S // 2)]
        return merge_attention(*parts[0], *parts[1])

    def of(function):
        with backend.interpret_mode():
            out, vjp = jax.vjp(function, q, k, v)
            return jax.tree.leaves((out, vjp((d_out, d_lse))))

    for mine, theirs in zip(of(merged), of(functools.partial(attend, mask=whole)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("width", range(8, 257, 8))
def test_a_head_is_held_in_powers_of_two_without_waste(width):
    pieces = heads.pieces(width)
    ends = [0, *(start + size for start, size in pieces)]
    assert [start for start, _ in pieces] == ends[:-1]
    assert width <= ends[-1] < width + 16
    assert all(size >= 16 and size.bit_count() == 1 for _, size in pieces)


def shapes(B, T, N, H, S, K):
    q, kv = (jax.ShapeDtypeStruct((B, *rest, H), jnp.bfloat16) for rest in ((T, N), (S, K)))
    return q, kv, kv


@pytest.mark.parametrize("name", EVERY_MASK)
def test_cost_counts_what_the_mask_leaves(name):
    mask = EVERY_MASK[name]()
    pairs = int(dense(mask, 2, 77, 77).sum())
    arrays = (*shapes(2, 77, 6, 72, 77, 3), mask, None)
    forward = cost.forward(*arrays)
    assert forward.flops == 4 * 6 * pairs * 72
    assert forward.transcendentals == 6 * pairs
    assert 2 * cost.backward(*arrays).flops == 5 * forward.flops


def test_cost_of_a_mask_whose_values_are_not_known_is_that_of_none():
    mask = jax.eval_shape(lambda: AttentionMask.causal(40, 24))
    q, k, v = shapes(2, 40, 6, 72, 24, 3)
    assert cost.forward(q, k, v, mask, None).flops == cost.forward(q, k, v, None, None).flops


def test_a_kernel_is_compiled_once_for_all_masks_of_a_shape():
    """Outside jit a kernel is given values; an estimate made of them would be another kernel for each."""
    q = jnp.ones((1, 32, 1, 16))

    def estimate(mask):
        static = {"scale": None, "softcap": None, "return_lse": False}
        with backend.interpret_mode():
            jaxpr = jax.make_jaxpr(lambda q: triton.forward(q, q, q, mask, None, **static)[0])(q)
        [call] = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
        return call.params["cost_estimate"]

    windows = [AttentionMask.sliding_window(32, left=left) for left in (2, 20)]
    assert estimate(windows[0]) == estimate(windows[1])


def test_cost_counts_every_array_once():
    arrays = (*shapes(2, 40, 6, 72, 24, 3), AttentionMask.causal(40, 24), jax.ShapeDtypeStruct((6,), jnp.float32))
    static = {"scale": None, "softcap": None, "return_lse": False}
    out, residuals = jax.eval_shape(functools.partial(triton.forward, **static), *arrays)
    gradients = jax.eval_shape(functools.partial(triton.backward, **static), residuals, out)
    size = lambda arrays: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))
    assert cost.forward(*arrays).bytes == size(residuals)  # the inputs, the output, lse
    assert cost.backward(*arrays).bytes == size(residuals) + size(out) + size(gradients)


BAD_SHAPES = {
    "wanted q (B, T, N, H) and k, v (B, S, K, H)": ((4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)),
    "k and v must have one shape": ((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)),
    "agree in batch and head width, got q (1, 4, 2, 8)": ((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)),
    "agree in batch and head width, got q (1, 4, 2, 16)": ((1, 4, 2, 16), (1, 4, 2, 8), (1, 4, 2, 8)),
    "must be a multiple of key heads, got 3 and 2": ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)),
}
BAD_OPTIONS = {
    "scale must be a finite number, got nan": {"scale": float("nan")},
    "softcap must be a finite number above 0, got -1.0": {"softcap": -1.0},
    "sinks must be one score per query head, (N,) = (2,), got (3,)": {"sinks": jnp.zeros(3)},
    "the mask has num_keys = 5, but k has S = 4 keys": {"mask": AttentionMask.causal(4, 5)},
    "no implementation='cuda'; choose from xla, ": {"implementation": "cuda"},
}


def refusal(*shapes, **options):
    with pytest.raises(ValueError) as refused:
        flash_attention(*(jnp.zeros(shape) for shape in shapes), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("message", BAD_SHAPES)
def test_arrays_that_do_not_fit_are_refused_in_one_line(message, unchecked_arrays):
    assert message in refusal(*BAD_SHAPES[message])


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_options_that_make_no_sense_are_refused_in_one_line(message, unchecked_arrays):
    assert message in refusal(*[(1, 4, 2, 8)] * 3, **BAD_OPTIONS[message])


def test_dtypes_that_differ_are_refused():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="one dtype, got float32, bfloat16 and float32; cast them"):
        flash_attention(q, q.astype(jnp.bfloat16), q)


@pytest.mark.parametrize("width, why", [(12, "multiple of 8 up to 256, got 12"), (264, "up to 256, got 264")])
def test_triton_says_which_head_widths_it_takes(width, why):
    q = jnp.zeros((1, 4, 2, width))
    with backend.interpret_mode(), pytest.raises(NotImplementedError, match=why):
        flash_attention(q, q, q, implementation="triton")


def test_the_cases_cover_every_kind_of_mask():
    """What inspect and bench run over: the kinds that a model has, at its own sizes."""
    kinds = {case.arrays[3].kind for case in FLASH_ATTENTION.cases.values() if case.arrays[3] is not None}
    assert kinds >= {"causal", "padding", "packed", "mixed", "unified", "sliding_window"}
