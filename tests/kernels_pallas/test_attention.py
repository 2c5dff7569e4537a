"""What is particular to attention: its definition, its masks, every shape it takes, and what it refuses.

The oracle is a float64 softmax in NumPy, forward and backward by hand, that shares no line with the package.
A result passes when `max|result - oracle| <= 2 max|plain - oracle| + floor`: FlashAttention's own rule. `plain`
is attention as one writes it in jnp, and the floor two ulps of the inputs' dtype at the largest sum of terms'
sizes: where a softmax leaves one weight near 1, gradients are small differences of large terms, and a kernel
that has them from a rounded output, as FlashAttention does, rounds the terms.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

from kernels_pallas import backend, flash_attention
from kernels_pallas.attention import cost, triton


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def by_hand(q, k, v, d_out, *, causal, scale, dtype=np.float64):
    """([out, d_q, d_k, d_v], the same sums over the sizes of their terms), one query of one head at a time."""
    q, k, v, d_out = (np.asarray(x, dtype) for x in (q, k, v, d_out))
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = dtype(q.shape[3] ** -0.5 if scale is None else scale)
    results, sizes = ([np.zeros_like(x) for x in (q, q, k, v)] for _ in range(2))
    for b, n, t in np.ndindex(q.shape[0], q.shape[2], T):
        seen = max(0, min(S, t + S - T + 1)) if causal else S
        if seen == 0:
            continue
        of_query, of_keys = (b, t, n), (b, slice(seen), n // group)
        scores = k[of_keys] @ q[of_query] * scale
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        d_weights = v[of_keys] @ d_out[of_query]
        d_scores = weights * (d_weights - weights @ d_weights) * scale
        d_sizes = weights * (np.abs(d_weights) + np.abs(weights @ d_weights)) * np.abs(scale)
        for (out, d_q, d_k, d_v), d, sized in ((results, d_scores, lambda x: x), (sizes, d_sizes, np.abs)):
            out[of_query] = weights @ sized(v[of_keys])
            d_q[of_query] = d @ sized(k[of_keys])
            d_k[of_keys] += np.outer(d, sized(q[of_query]))
            d_v[of_keys] += np.outer(weights, sized(d_out[of_query]))
    return results, sizes


def random(B, T, S, K, group, H, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent of the output."""
    shapes = [(B, T, K * group, H), (B, S, K, H), (B, S, K, H), (B, T, K * group, H)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, s, jnp.float32).astype(dtype) for key, s in zip(keys, shapes, strict=True)]


def run(attention, q, k, v, d_out, **static):
    """[out, d_q, d_k, d_v] of an attention function; a Pallas kernel in it is interpreted."""

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(functools.partial(attention, **static), q, k, v)
        return [out, *vjp(d_out)]

    with backend.interpret_mode():
        lowered = jax.jit(both).lower(q, k, v, d_out)
    # Unoptimised, for the compiler takes longer than the one run.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(q, k, v, d_out)


def plain(q, k, v, *, causal, scale):
    """Attention as one writes it in jnp: products in the inputs' dtype, and a softmax in float32."""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = jnp.tri(T, S, S - T if causal else S, dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(seen, weights, 0).astype(v.dtype), v)


REFERENCE = functools.partial(flash_attention, implementation="xla")
TRITON = functools.partial(flash_attention, implementation="triton")
NAMES = ("out", "d_q", "d_k", "d_v")


def assert_as_good(got, usual, oracle, dtype):
    results, sizes = oracle
    for name, mine, theirs, truth, size in zip(NAMES, got, usual, results, sizes, strict=True):
        error, usual_error = (np.abs(np.asarray(x, np.float64) - truth).max() for x in (mine, theirs))
        allowed = 2 * usual_error + 2 * float(jnp.finfo(dtype).eps) * size.max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


MASKED = {
    "full": {"shape": (2, 7, 19, 2, 1, 24), "causal": False, "scale": None},
    "grouped": {"shape": (1, 9, 9, 2, 3, 16), "causal": True, "scale": 0.3},
    "after a prefix": {"shape": (2, 5, 12, 1, 2, 8), "causal": True, "scale": None},
    "unseeing": {"shape": (2, 12, 5, 1, 2, 8), "causal": True, "scale": -0.5},
}


@pytest.mark.parametrize("case", MASKED)
def test_reference_is_softmax_attention(case):
    """Held to the float64 softmax as closely as that softmax itself in float32."""
    shape, static = MASKED[case]["shape"], {key: MASKED[case][key] for key in ("causal", "scale")}
    arrays = random(*shape)
    narrow, oracle = (by_hand(*arrays, **static, dtype=dtype) for dtype in (np.float32, np.float64))
    assert_as_good(run(REFERENCE, *arrays, **static), narrow[0], oracle, jnp.float32)


# No shrinking: each example compiles for seconds, and one that fails is small enough to read.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lengths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    width=st.sampled_from(range(8, 137, 8)),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_triton_takes_every_shape(lengths, heads, width, causal, scale, dtype):
    arrays = random(1, *lengths, *heads, width, dtype)
    static = {"causal": causal, "scale": scale}
    oracle = by_hand(*arrays, **static)
    assert_as_good(run(TRITON, *arrays, **static), run(plain, *arrays, **static), oracle, dtype)


def test_triton_keeps_large_scores_apart():
    """Scores past a hundred, whose exponentials overflow unless the maximum is taken off first."""
    q, *rest = random(1, 50, 50, 1, 1, 64)
    arrays = [30 * q, *rest]
    static = {"causal": True, "scale": None}
    oracle = by_hand(*arrays, **static)
    assert_as_good(run(TRITON, *arrays, **static), run(plain, *arrays, **static), oracle, jnp.float32)


@pytest.mark.parametrize("attention", [REFERENCE, TRITON], ids=["xla", "triton"])
def test_queries_that_see_nothing_give_nothing_and_take_nothing(attention):
    """Whatever their cotangent: their own output and gradient are 0, and the keys' gradient is untouched."""
    T, S = 70, 33
    q, k, v, d_out = random(1, T, S, 1, 2, 16)
    blind = (jnp.arange(T) < T - S)[None, :, None, None]
    out, d_q, d_k, d_v = run(attention, q, k, v, d_out, causal=True)
    assert not np.any(out[:, : T - S]) and not np.any(d_q[:, : T - S])
    assert np.all(np.any(out[:, T - S :], axis=-1))
    again = run(attention, q, k, v, jnp.where(blind, 100 * d_out, d_out), causal=True)
    for mine, theirs in zip((out, d_q, d_k, d_v), again, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("width", range(8, 257, 8))
def test_a_head_is_held_in_powers_of_two_without_waste(width):
    pieces = triton.pieces(width)
    ends = [0, *(start + size for start, size in pieces)]
    assert [start for start, _ in pieces] == ends[:-1]
    assert width <= ends[-1] < width + 16
    assert all(size >= 16 and size.bit_count() == 1 for _, size in pieces)


@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (3, 8), (8, 3), (1, 9), (9, 1)])
def test_cost_counts_what_the_mask_leaves(T, S):
    pairs = sum(s <= t + S - T for t in range(T) for s in range(S))
    q, kv = (
        jax.ShapeDtypeStruct((2, T, 6, 72), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, S, 3, 72), jnp.bfloat16),
    )
    for causal, count in ((False, T * S), (True, pairs)):
        forward = cost.forward(q, kv, kv, causal=causal, scale=None)
        assert forward.flops == 4 * 2 * 6 * count * 72
        assert forward.transcendentals == 2 * 6 * count
        assert 2 * cost.backward(q, kv, kv, causal=causal, scale=None).flops == 5 * forward.flops


def test_cost_counts_every_array_once():
    q, kv = (
        jax.ShapeDtypeStruct((2, 40, 6, 72), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 24, 3, 72), jnp.bfloat16),
    )
    static = {"causal": True, "scale": None}
    out, residuals = jax.eval_shape(functools.partial(triton.forward, **static), q, kv, kv)
    gradients = jax.eval_shape(functools.partial(triton.backward, **static), residuals, out)
    size = lambda arrays: sum(a.size * a.dtype.itemsize for a in arrays)
    assert cost.forward(q, kv, kv, **static).bytes == size(residuals)  # q, k, v, the output, lse
    assert cost.backward(q, kv, kv, **static).bytes == size(residuals) + size([out]) + size(gradients)


ZEROS = {
    "want q (B, T, N, H) and k, v (B, S, K, H)": ((4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)),
    "k and v must have one shape": ((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)),
    "agree in batch and head width, got q (1, 4, 2, 8)": ((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)),
    "agree in batch and head width, got q (1, 4, 2, 16)": ((1, 4, 2, 16), (1, 4, 2, 8), (1, 4, 2, 8)),
    "must be a multiple of key heads, got 3 and 2": ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)),
}


@pytest.fixture
def as_users_have_it():
    """Without the check of annotations that tests run under, which speaks first and at length."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("message", ZEROS)
def test_arrays_that_do_not_fit_are_refused_in_one_line(message, as_users_have_it):
    with pytest.raises(ValueError) as refused:
        flash_attention(*(jnp.zeros(shape) for shape in ZEROS[message]))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_dtypes_that_differ_are_refused():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="one dtype, got float32, bfloat16 and float32; cast them"):
        flash_attention(q, q.astype(jnp.bfloat16), q)


@pytest.mark.parametrize("width, why", [(12, "multiple of 8 up to 256, got 12"), (264, "up to 256, got 264")])
def test_triton_says_which_head_widths_it_takes(width, why):
    q = jnp.zeros((1, 4, 2, width))
    with backend.interpret_mode(), pytest.raises(NotImplementedError, match=why):
        flash_attention(q, q, q, implementation="triton")
