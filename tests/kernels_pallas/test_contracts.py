"""Values that break a contract, NaN where nobody may see it, 64-bit mode, scores that diverge: the same everywhere.

Right values are known: a call with the values that are meant instead, or zeros in place of what must not be seen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import AttentionMask, Routing, backend, hardware


EACH = pytest.mark.parametrize("implementation", ["xla", "triton"])
NAN, T = jnp.nan, 40
DOCUMENTS = np.repeat([0, 1, -1], [22, 10, 8])[None]


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def run(function, *arguments):
    """Under jit, where values are not known, in interpret mode."""
    with backend.interpret_mode():
        return jax.jit(function)(*arguments)


def close(got, want, rtol=2e-5):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol)


# Values out of range that are not known.


@EACH
def test_lengths_past_the_keys_are_the_number_of_keys(implementation):
    q, k, v = draw(*[(3, 20, 2, 16)] * 3)
    attend = lambda mask: kp.flash_attention(q, k, v, mask=mask, return_lse=True, implementation=implementation)
    lengths = lambda n, m: attend(AttentionMask.padding(n, 20, query_lengths=m))
    got = run(lengths, jnp.array([33, 7, -2]), jnp.array([20, 99, 5]))
    close(got, run(lengths, jnp.array([20, 7, 0]), jnp.array([20, 20, 5])))
    made = jax.jit(lambda n: AttentionMask.padding(n, 20).end)(jnp.array([33, 7, -2]))
    np.testing.assert_array_equal(made[:, 0], [20, 7, 0])
    start, end = jnp.full((3, 20), -3, jnp.int8), jnp.full((3, 20), 100, jnp.int8)
    got = run(lambda s, e: attend(AttentionMask(s, e, num_keys=20)), start, end)
    close(got, kp.flash_attention(q, k, v, return_lse=True))


@EACH
def test_private_numbers_below_zero_are_seen_by_nobody(implementation):
    q, k, v = draw(*[(1, 20, 1, 16)] * 3)

    def attend(q_private, k_private):
        start, end = jnp.zeros((1, 20), jnp.int32), jnp.full((1, 20), 20, jnp.int32)
        mask = AttentionMask(start, end, q_private, k_private, num_keys=20)
        return kp.flash_attention(q, k, v, mask=mask, implementation=implementation)

    private = jnp.where(jnp.arange(20) < 12, 0, -1)[None]
    want = kp.flash_attention(q, k[:, :12], v[:, :12])
    close(run(attend, private, private), want)
    with pytest.raises(ValueError, match="mask.q_private must be from 0 to .*, got -1 to 0"):
        attend(private, private)


def test_documents_that_are_not_known_never_join():
    """An id that returns is another document; numbers that 32 bits cannot hold stay apart."""
    mask = jax.jit(AttentionMask.packed)(jnp.array([[3, 3, 1, 3, 3]]))
    np.testing.assert_array_equal(mask.dense()[0], np.kron(np.eye(5), [1])[0:5] + np.eye(5, k=1) * [0, 1, 0, 0, 1]
                                  + np.eye(5, k=-1) * [1, 0, 0, 1, 0])  # fmt: skip
    with jax.enable_x64(True):
        mask = jax.jit(AttentionMask.packed)(jnp.array([[2**32, 0, 0, -(2**33)]]))
        np.testing.assert_array_equal(mask.dense()[0], [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="within int32, got 4294967296"):
        AttentionMask.packed(np.array([[2**32, 0]]))
    unified = jax.jit(AttentionMask.unified)(
        jnp.array([[0, 0, 1, 1]]), jnp.array([[-1, 5, 5, 5]]), jnp.zeros((1, 4), bool)
    )
    assert not np.asarray(unified.dense())[0, :2, 2:].any(), "an image that crosses documents"
    narrow = jnp.array([[127, 127, -1]], jnp.int8)
    noised = jax.jit(AttentionMask.unified)(jnp.zeros((1, 3), jnp.int8), narrow, narrow >= 0)
    np.testing.assert_array_equal(noised.dense()[0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


@EACH
def test_experts_that_do_not_exist_are_no_expert(implementation, unchecked_arrays):
    x, w = jnp.eye(5), jnp.stack([jnp.eye(5) * 10, jnp.eye(5) * 20])

    def through(index):
        routing = kp.by_index(index, num_experts=2).route()
        rows = kp.dispatch(x, routing, implementation=implementation)
        y = kp.grouped_matmul(rows, w, routing.group_sizes, implementation=implementation)
        return jnp.diag(kp.combine(y, routing, implementation=implementation))

    for dtype in (jnp.int8, jnp.int32, jnp.uint32):
        np.testing.assert_array_equal(run(through, jnp.array([0, -1, 1, 0, 9]).astype(dtype)), [10, 0, 20, 10, 0])
    listed = lambda t, e: kp.Assignments(t, e, jnp.ones(5), num_tokens=4, num_experts=2).route().token_sizes
    wild = jnp.array([0, 1, 2, 3, 9]), jnp.array([-1, 0, 1, 7, 1])
    np.testing.assert_array_equal(run(listed, *wild), [0, 1, 1, 0])
    with pytest.raises(ValueError, match="Assignments: expert must be 0 to 2"):
        listed(*wild)
    with pytest.raises(ValueError, match="by_index: index must be 0 to 2, where 2 means no expert, got -1 at"):
        through(jnp.array([0, -1, 1, 0, 2]))
    many = jax.jit(lambda e: kp.by_index(e, num_experts=300).rows_of_experts())(jnp.array([0, 100, 127], jnp.int8))
    assert many.tolist() == [int(i in (0, 100, 127)) for i in range(300)]


@EACH
def test_group_sizes_are_cut_and_not_wrapped(implementation, unchecked_arrays):
    x, w = draw((230, 8), (3, 8, 4))
    multiply = functools.partial(kp.grouped_matmul, x, w, implementation=implementation)
    want = run(multiply, jnp.array([100, 110, 20]))
    close(run(multiply, jnp.array([100, 110, 127], jnp.int8)), want)
    close(run(multiply, jnp.array([100, 110, 2**31 - 1])), want)
    close(run(multiply, jnp.array([-5, 100, 110])), run(multiply, jnp.array([0, 100, 110])))
    with pytest.raises(ValueError, match="a sum of at most 230"):
        multiply(jnp.array([100, 110, 127], jnp.int8))
    with pytest.raises(ValueError, match="group_sizes must be integers, got float32"):
        multiply(jnp.array([100.0, 110.0, 20.0]))


@EACH
def test_what_is_past_a_capacity_is_dropped(implementation):
    """Tokens 0, 1, 2 at expert 0 and 3 at expert 1, with two slots each: token 2 has no row."""
    x = jnp.arange(1.0, 5)[:, None] * jnp.ones((4, 8))

    def through(index):
        slots = kp.to_slots(kp.by_index(index, num_experts=2).route(), 2)
        return kp.combine(kp.dispatch(x, slots, implementation=implementation), slots, implementation=implementation)

    np.testing.assert_array_equal(run(through, jnp.array([0, 0, 0, 1]))[:, 0], [1, 2, 0, 4])
    np.testing.assert_array_equal(run(through, jnp.array([1, 0, 0, 1]))[:, 0], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="group_sizes must be within capacity=2, got 3"):
        through(jnp.array([0, 0, 0, 1]))


@EACH
def test_a_routing_of_numbers_that_do_not_exist_reads_nothing_else(implementation):
    good = kp.by_index(jnp.array([1, 0, 1, 0]), num_experts=2).route()
    wild = Routing(
        row_index=good.row_index + 100,
        group_sizes=good.group_sizes + 2**30,
        row_weight=good.row_weight,
        inverse=good.inverse - 100,
        token_sizes=good.token_sizes + 50,
    )
    x, w_up, w_down = draw((4, 8), (2, 8, 12), (2, 6, 8))
    out = run(lambda r: kp.expert_mlp(x, r, w_up, w_down, implementation=implementation), wild)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="routing.row_index must be 0 to 3, got 10"):
        kp.dispatch(x, wild)


@EACH
def test_lengths_and_pages_of_a_cache_are_cut(implementation):
    q, k, v = draw((2, 2, 16), (2, 20, 1, 16), (2, 20, 1, 16))
    attend = lambda n: kp.decode_attention(q, k, v, n, implementation=implementation)
    close(run(attend, jnp.array([99, -3])), run(attend, jnp.array([20, 0])))
    pages = draw(*[(3, 16, 1, 16)] * 2)
    paged = lambda table, n: kp.paged_decode_attention(q, *pages, table, n, implementation=implementation)
    got = run(paged, jnp.array([[7, 1], [-4, 2]]), jnp.array([99, 20]))
    close(got, run(paged, jnp.array([[2, 1], [0, 2]]), jnp.array([32, 20])))


@EACH
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_labels_that_do_not_exist_are_ignored(implementation, dtype, unchecked_arrays):
    x, w = draw((5, 16), (16, 100))
    loss = lambda labels: kp.linear_cross_entropy(x, w, labels, implementation=implementation)[0]
    labels = jnp.array([3, 100, 99, 120, 0]).astype(dtype)
    got = run(loss, labels)
    want = run(loss, jnp.array([3, -100, 99, -100, 0]))
    close(got, want)
    assert np.count_nonzero(got) == 3
    with pytest.raises(ValueError, match=r"labels must be 0 to 99 or ignore_index = -100, got (100|120) at \[[13]\]"):
        loss(labels)


def test_a_shard_that_lies_outside_draws_nothing_twice():
    key, nonce = jnp.arange(8, dtype=jnp.uint32), jnp.arange(3, dtype=jnp.uint32)
    draw_ = lambda start: kp.secure_normal(jnp.zeros((4, 8)), key, nonce, start=start, whole=(8, 16))
    digest = lambda start: kp.state_digest(jnp.ones((4, 8)), start=start, whole=(8, 16))
    for inside in ([0, 0], [4, 8], [3, 5]):
        start = jnp.array(inside)
        np.testing.assert_array_equal(jax.jit(draw_)(start), draw_(start))
        np.testing.assert_array_equal(jax.jit(digest)(start), digest(start))
    for outside in ([6, 0], [0, 12], [-1, 0]):
        start = jnp.array(outside)
        assert np.isnan(jax.jit(draw_)(start)).all()
        assert jax.jit(digest)(start).tolist() == [2**32 - 1] * 4
        for function in (draw_, digest):
            with pytest.raises(ValueError, match="the shard is not inside the whole array"):
                function(start)
    for function in (draw_, digest):
        with pytest.raises(ValueError, match=r"start must be one number per dim, \(2,\), got \(1,\)"):
            function(jnp.array([4]))


# NaN and inf.


@EACH
@pytest.mark.parametrize("what", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_documents_do_not_leak(implementation, what, value):
    """NaN in the second document and in padding: results and gradients of the first are those with zeros there."""
    arrays = dict(zip(("q", "k", "v", "d_out"), draw(*[(1, T, 2, 16)] * 4), strict=True))
    mask = AttentionMask.packed(DOCUMENTS)

    def passes(q, k, v, d_out):
        attend = functools.partial(kp.flash_attention, mask=mask, return_lse=True, implementation=implementation)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp((d_out, d_out[..., 0]))

    got = run(passes, *(arrays | {what: arrays[what].at[:, 22:].set(value)}).values())
    want = run(passes, *arrays.values())
    first = lambda results: [x[:, :22] for x in jax.tree.leaves(results)]
    if what == "d_out" and implementation == "xla":  # the docstring says so
        got, want = got[0], want[0]
    close(first(got), first(want))
    if what in ("k", "v"):
        assert np.isnan(got[0][0][:, 22:32]).all(), "who sees NaN has it"
    assert not np.asarray(got[0][0][:, 32:]).any(), "padding sees nothing"


@EACH
def test_the_tangent_of_documents_does_not_leak(implementation):
    q, k, v, t_q, t_k, t_v = draw(*[(1, T, 1, 16)] * 6)
    mask = AttentionMask.packed(DOCUMENTS)

    def tangent(k, v, t_k, t_v):
        attend = functools.partial(kp.flash_attention_jvp, mask=mask, implementation=implementation)
        return jax.jvp(attend, (q, k, v), (t_q, t_k, t_v))[1]

    bad = [x.at[:, 22:].set(NAN) for x in (k, v, t_k, t_v)]
    close(run(tangent, *bad)[:, :22], run(tangent, k, v, t_k, t_v)[:, :22])


@EACH
def test_sinks_get_no_gradient_from_padding(implementation):
    q, k, v, d_out = draw(*[(1, T, 2, 16)] * 4)
    mask, sinks = AttentionMask.packed(DOCUMENTS), jnp.array([0.5, -0.5])
    attend = lambda s: kp.flash_attention(q, k, v, mask=mask, sinks=s, implementation=implementation)
    grad = lambda d_out: jax.vjp(attend, sinks)[1](d_out)[0]
    close(run(grad, d_out.at[:, 32:].set(NAN)), run(grad, d_out))


@EACH
def test_ignored_rows_do_not_leak(implementation):
    x, w = draw((6, 16), (16, 50))
    labels = jnp.array([1, -100, 2, 3, -100, 49])

    def passes(x):
        loss = lambda x, w: kp.linear_cross_entropy(x, w, labels, z_loss=0.1, implementation=implementation)[0].sum()
        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    for value in (NAN, jnp.inf):
        close(run(passes, x.at[1].set(value)), run(passes, x))


@EACH
def test_experts_do_not_leak(implementation):
    """NaN in a token of expert 0, in padding rows and in one token's weight: no other token or expert has it."""
    x, w, d_y = draw((30, 8), (3, 8, 4), (30, 4))
    sizes = jnp.array([10, 8, 7])

    def passes(x, d_y):
        y, vjp = jax.vjp(lambda x, w: kp.grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *vjp(d_y)

    got = run(passes, x.at[3].set(NAN).at[25:].set(NAN), d_y.at[25:].set(NAN))
    want = run(passes, x, d_y)
    close(got[0][4:], want[0][4:])
    close(got[1][4:], want[1][4:])
    close(got[2][1:], want[2][1:])
    assert np.isnan(got[2][0]).all()

    index = jnp.array([0, 0, 1, 2, 2, 2])  # token 0 has one row, others two or three
    choices = kp.Assignments(jnp.array([0, 1, 1, 2, 2, 2]), index, jnp.ones(6).at[0].set(NAN), 3, 3)
    y = run(lambda y: kp.combine(y, choices.route(), implementation=implementation), jnp.ones((6, 8)))
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1:, 0], [2, 3])
    choices = kp.Assignments(jnp.array([0, 1, 1, 2, 2, 2]), index[::-1], jnp.ones(6).at[5].set(NAN), 3, 3)
    y = run(lambda y: kp.combine(y, choices.route(), implementation=implementation), jnp.ones((6, 8)))
    np.testing.assert_array_equal(y[:2, 0], [1, 2])


# Routers whose scores underflow.


@pytest.mark.parametrize("shift", [0.0, -40.0, -50.0, -110.0, -1e5])
def test_sigmoid_weights_are_ratios_of_dead_scores(shift):
    """Far below 0 sigmoid(x) is exp(x), so the weights are those of a softmax; their sum is 1, its gradient 0."""
    logits = np.array([[0.0, -1.0, 2.0, 3.0]])
    given = jnp.asarray(logits + shift, jnp.float32)
    bias = jnp.array([60.0, 60.0, 0.0, 0.0])
    weights = lambda x: kp.top_k_sigmoid(x, bias, active=2).weight
    score = 1 / (1 + np.exp(-(logits + max(shift, -600))))
    want = score[0, :2] / score[0, :2].sum() if shift > -600 else np.exp([0.0, -1]) / (1 + np.exp(-1.0))
    np.testing.assert_allclose(weights(given), want, rtol=1e-2 if shift < -1e3 else 1e-5)
    every = np.exp(logits) / np.exp(logits).sum() if shift < -20 else score / score.sum()
    np.testing.assert_allclose(kp.sigmoid_scores(given), every, rtol=1e-2 if shift < -1e3 else 1e-4)
    np.testing.assert_allclose(jax.grad(lambda x: weights(x).sum())(given), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: kp.sigmoid_scores(x).sum())(given), 0, atol=1e-6)


def test_experts_that_are_all_shut_out_have_equal_shares():
    shut = jnp.full((1, 4), -jnp.inf)
    np.testing.assert_array_equal(kp.softmax_scores(shut), [[0.25] * 4])
    np.testing.assert_array_equal(kp.sigmoid_scores(shut), [[0.25] * 4])
    some = jnp.array([[-jnp.inf, 0.0, 0.0, -jnp.inf]])
    for scores in (kp.softmax_scores, kp.sigmoid_scores):
        np.testing.assert_array_equal(scores(some), [[0, 0.5, 0.5, 0]])
        assert np.isfinite(jax.grad(lambda x, scores=scores: (scores(x) ** 2).sum())(some)).all()


# Scores without bound.


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("mask", [None, AttentionMask.causal(37)], ids=["full", "causal"])
def test_a_weight_of_the_backward_is_at_most_one(size, mask):
    """d_v of each key is at most the number of queries, with d_out = 1."""
    q, k, v = draw(*[(1, 37, 1, 64)] * 3)
    attend = lambda v: jnp.sum(
        jnp.asarray(kp.flash_attention(size * q, size * k, v, mask=mask, implementation="triton"))
    )
    d_v = run(jax.grad(attend), v)
    assert np.isfinite(d_v).all() and np.min(d_v) >= 0 and np.max(d_v) <= 37 * 1.0001


def test_a_probability_of_the_loss_is_at_most_one():
    """d_x = w (p - label), with a logsumexp that rounded to less than the logits are: each p counts as 1."""
    x, w = draw((20, 16), (16, 90))
    options = dict(ignore_index=-100, z_loss=0.0, logit_softcap=None)
    residuals = x, w, jnp.zeros(20, jnp.int32), jnp.full(20, -1e6)
    backward = functools.partial(kp.LINEAR_CROSS_ENTROPY.kernels["triton"].backward, **options)
    d_x, *_ = run(backward, residuals, (jnp.ones(20), jnp.zeros(20)))
    close(d_x, jnp.broadcast_to((w.sum(axis=1) - w[:, 0])[None], d_x.shape), rtol=1e-4)


# 64-bit mode, eager calls, second derivatives.


def calls():
    """One call of each op with a Triton kernel, of float32 arrays, with their gradients."""
    q, k, v = draw(*[(1, 6, 2, 16)] * 3)
    x, w, up, down = draw((6, 16), (2, 16, 8), (16, 2, 8), (8, 16))
    routing = kp.by_index(jnp.array([0, 1, 1, 0, 1, 2]), num_experts=2).route()
    lengths, nil = jnp.array([4]), jnp.zeros(6, int)
    mask = AttentionMask.packed(jnp.array([[0, 0, 1, 1, 1, -1]]))
    pages = q[0].reshape(1, 12, 1, 16)[:, :, :, :].repeat(2, axis=1)[:, :16]
    on: dict[str, Any] = {"implementation": "triton"}
    return {
        "flash_attention": (lambda q: kp.flash_attention(q, k, v, mask=mask, sinks=jnp.zeros(2, jnp.float32), **on), q),
        "decode_attention": (lambda k: kp.decode_attention(q[:, 0], k, v, lengths, **on), k),
        "paged_decode_attention": (
            lambda p: kp.paged_decode_attention(q[:, 0], p, p, jnp.array([[0]]), lengths, **on), pages),
        "modulated_norm": (lambda x: kp.modulated_norm(x[None], **on), x),
        "gated_residual_norm": (lambda x: kp.gated_residual_norm(x[None], x[None], x[:1], **on), x),
        "qk_norm_rope": (lambda q: kp.qk_norm_rope(
            jnp.stack([q] * 3, 3), q[0, 0, 0], q[0, 0, 0], kp.Rotation.grid((6,), 16), **on), q),
        "gated_mlp": (lambda x: kp.gated_mlp(x, up, down, **on), x),
        "dense_mlp": (lambda x: kp.dense_mlp(x, up[:, 0], down[:, 0], down, x[0], **on), x),
        "dispatch": (lambda x: kp.dispatch(x, routing, **on), x),
        "combine": (lambda x: kp.combine(x, routing, **on), x),
        "grouped_matmul": (lambda x: kp.grouped_matmul(x, w, jnp.array([2, 3]), **on), x),
        "expert_mlp": (lambda x: kp.expert_mlp(x, routing, w, jnp.swapaxes(w, 1, 2)[:, :4], **on), x),
        "linear_cross_entropy": (lambda x: kp.linear_cross_entropy(x, w[0], nil, z_loss=0.1, **on), x),
        "ghost_norm_sq": (lambda x: kp.ghost_norm_sq(x[None], x[None], nil[None], **on), x),
        "clip_reduce": (lambda x: kp.clip_reduce(x[None], x[None], jnp.ones(1), **on), x),
    }  # fmt: skip


NAMES = sorted(calls())


def total(function):
    return lambda x: sum(jnp.sum(y**2) for y in jax.tree.leaves(function(x)))


def test_every_op_with_a_triton_kernel_is_called():
    assert {op.name for op in kp.OPS if "triton" in op.kernels} == {*NAMES, "flash_attention_tangent"}


@pytest.mark.parametrize("name", NAMES)
def test_64_bit_mode_traces_and_lowers_for_cuda(name):
    device = jax.sharding.AbstractDevice(device_kind=hardware.H200.device_kind, platform="gpu", num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(mesh):
        function, x = calls()[name]
        passes = jax.jit(jax.value_and_grad(total(function)))
        assert name in passes.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["modulated_norm", "grouped_matmul"])
def test_64_bit_mode_changes_nothing(name):
    function, x = calls()[name]
    want = run(jax.value_and_grad(total(function)), x)
    with jax.enable_x64(True):
        function, x = calls()[name]
        got = run(jax.value_and_grad(total(function)), x)
    close(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["modulated_norm", "decode_attention", "combine"])
def test_eager_calls_and_gradients_compile_once(name):
    function, x = calls()[name]
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    with backend.interpret_mode():
        for call in (function, jax.grad(total(function))):
            call(x), call(x)
            jax.monitoring.register_event_duration_secs_listener(listener)
            try:
                call(x)
            finally:
                jax.monitoring.unregister_event_duration_listener(listener)
            assert not compiled


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_say_what_to_do(name):
    function, x = calls()[name]
    squares = total(lambda x: jax.tree.map(lambda y: y**2, function(x)))
    words = rf"{name}: implementation='triton' has first derivatives only.*Use implementation=\"xla\""
    for twice in (jax.grad(lambda x: jax.grad(squares)(x).sum()), lambda x: jax.jvp(jax.grad(squares), (x,), (x,))):
        with backend.interpret_mode(), pytest.raises(NotImplementedError, match=words):
            jax.eval_shape(twice, x)


def test_attention_with_tangents_can_be_linearized():
    q, k, v, t = draw(*[(1, 6, 1, 16)] * 4)
    attend = lambda q: kp.flash_attention_jvp(q, k, v, implementation="xla")
    out, linear = jax.linearize(attend, q)
    close((out, linear(t)), jax.jvp(attend, (q,), (t,)))
