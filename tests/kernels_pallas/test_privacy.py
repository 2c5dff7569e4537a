"""What is particular to private training: that norms are those of real layers' gradients, by either way, that what does
not count does not, that an example's norm is its own, and that a clipped example keeps its bound.

The oracle is float64 NumPy that builds each example's gradient, and shares no line with the package.
"""

import functools
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import CLIP_REDUCE, GHOST_NORM_SQ, backend, clip_reduce, ghost_norm_sq, hardware
from kernels_pallas.privacy import cost, triton
from kernels_pallas.privacy.blocks import blocks_for


pytestmark = pytest.mark.recorded


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "triton"])
WAYS = pytest.mark.parametrize("pairs", [False, True], ids=["by matrix", "by pairs"])
H200 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(hardware.H200.device_kind, 132, "gpu")
)


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def arrays(B, T, D, F, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, T, width)), jnp.dtype(dtype)) for width in (D, F))


def random_groups(B, T, experts, seed=0, *, absent=True):
    """From -1, or 0, to experts - 1."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1 if absent else 0, experts, (B, T)), jnp.int32)


def run(function, *given):
    """Under jit, Pallas interpreted, and compiled in haste."""
    with backend.interpret_mode():
        lowered = jax.jit(function).lower(*given)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*given)


def norms(*given, implementation="triton", pairs=None, **static):
    """The squares of ghost_norm_sq; of the Triton kernel, by the way named."""
    return both(*given, implementation=implementation, pairs=pairs, **static)[0]


def both(*given, implementation="triton", pairs=None, **static):
    """The squares and the bounds of ghost_norm_sq."""
    rule = cost.pairs_are_fewer if pairs is None else lambda *sizes: pairs
    with mock.patch.object(cost, "pairs_are_fewer", rule):
        found = run(functools.partial(ghost_norm_sq, implementation=implementation, **static), *given)
    return tuple(map(np.asarray, found))


def sums(*given, implementation="triton"):
    return np.asarray(run(functools.partial(clip_reduce, implementation=implementation), *given))


def gradients(a, g) -> np.ndarray:
    """(B, D, F) in float64: each example's own."""
    a64, g64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (a, g))
    return np.einsum("btd,btf->bdf", a64, g64)


def squares(d_w) -> np.ndarray:
    return np.square(d_w).sum(axis=(1, 2))


# Norms.


@IMPLEMENTATIONS
@WAYS
@pytest.mark.parametrize("sizes", [(3, 37, 24, 40), (2, 5, 72, 56), (2, 1, 24, 40)], ids=str)
def test_norm_is_that_of_a_layers_gradient(implementation, pairs, sizes):
    """With its bias and without, as vmap of grad has it."""
    B, T, D, F = sizes
    if implementation == "triton" and T == 1:
        pytest.skip("the kernel refuses one row an example, which XLA does as well")
    a, d_y = arrays(*sizes)
    w, b = jnp.ones((D, F)), jnp.ones(F)
    loss = lambda params, x, d_y: jnp.sum(jnp.tanh(0.1 * (x @ params[0] + params[1][None])) * d_y)
    d_w, d_b = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))((w, b), a, d_y)
    of_outputs = jax.grad(lambda y: jnp.sum(jnp.tanh(0.1 * y) * d_y))(a @ w + b[None, None])
    for bias, want in ((False, squares(d_w)), (True, squares(d_w) + np.square(d_b).sum(axis=1))):
        got = norms(a, of_outputs, implementation=implementation, pairs=pairs, bias=bias)
        np.testing.assert_allclose(got, want, rtol=3e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("sizes", [(3, 37, 24, 40), (2, 150, 16, 24), (2, 1, 24, 40)], ids=str)
@pytest.mark.parametrize("in_order", [False, True], ids=["mixed", "sorted"])
def test_norm_of_experts_is_that_of_each_ones_gradient(implementation, sizes, in_order):
    B, T, D, F = sizes
    if implementation == "triton" and T == 1:
        pytest.skip("the kernel refuses one row an example, which XLA does as well")
    (a, g), groups = arrays(*sizes), random_groups(B, T, 4)
    groups = jnp.sort(groups, axis=1) if in_order else groups

    def loss(params, a, g, groups):
        w, b = (jnp.where((groups >= 0)[:, None, None], p[jnp.maximum(groups, 0)], 0) for p in params)
        return jnp.sum((jnp.einsum("td,tdf->tf", a, w) + b[:, 0]) * g)

    params = jnp.zeros((4, D, F)), jnp.zeros((4, 1, F))
    d_w, d_b = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))(params, a, g, groups)
    for bias, want in ((False, [d_w]), (True, [d_w, d_b])):
        got = norms(a, g, groups, implementation=implementation, bias=bias)
        np.testing.assert_allclose(got, sum(np.square(d).sum(axis=(1, 2, 3)) for d in want), rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("T", [2, 63, 64, 65, 128, 160, 256, 300])
def test_both_ways_agree(T, dtype):
    """One to five tiles of pairs, whole ones and not."""
    a, g = arrays(2, T, 40, 24, dtype)
    want = squares(gradients(a, g)) + np.square(np.asarray(g.astype(jnp.float32), np.float64).sum(axis=1)).sum(axis=1)
    for pairs in (False, True):
        np.testing.assert_allclose(norms(a, g, bias=True, pairs=pairs), want, rtol=2e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_shorter_way_is_taken(pairs):
    """And 2,048 rows of groups go by pairs even where the matrix is shorter."""
    a, g = (jax.ShapeDtypeStruct((2, 64 if pairs else 1024, 256), jnp.bfloat16) for _ in range(2))
    forward = functools.partial(triton.norm_forward, bias=False)
    with jax.sharding.use_abstract_mesh(H200):
        text = str(jax.make_jaxpr(lambda a, g: forward(a, g, None))(a, g))
        grouped = str(jax.make_jaxpr(forward)(a, g, jax.ShapeDtypeStruct(a.shape[:2], jnp.int32)))
    assert ("ghost_norm_sq_forward_pairs" in text, "ghost_norm_sq_forward_matrix" in text) == (pairs, not pairs)
    assert "ghost_norm_sq_forward_pairs" in grouped


def test_the_rule_counts_what_tiles_multiply():
    """Against the products of both kernels, counted: pairs in half of T x T with its diagonal's tiles whole."""
    for T, D, F in [(256, 1152, 3456), (256, 1152, 1152), (1024, 1152, 1152), (1024, 384, 1536), (256, 1152, 16),
                    (4096, 1152, 4608), (192, 256, 256), (192, 255, 256)]:  # fmt: skip
        tiles = T // cost.TILE
        pairs = tiles * (tiles + 1) // 2 * cost.TILE**2
        assert cost.pairs_are_fewer(T, D, F) == (2 * pairs * (D + F) < 2 * T * D * F), (T, D, F)
    assert cost.pairs_are_fewer(1024, 1152, 1152) and not cost.pairs_are_fewer(4096, 1152, 4608)  # as docs say


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("T, dtype", [(37, "float32"), (150, "bfloat16")])
def test_rows_that_do_not_count_may_hold_anything(implementation, poison, T, dtype):
    a, g = arrays(3, T, 24, 40, dtype)
    groups = random_groups(3, T, 3).at[2].set(-7)
    absent = (groups < 0)[:, :, None]
    given = [jnp.where(absent, jnp.array(poison, x.dtype), x) for x in (a, g)]
    got = norms(*given, groups, implementation=implementation, bias=True)
    want = norms(
        *(jnp.where(absent, jnp.array(0, x.dtype), x) for x in (a, g)), groups, implementation="xla", bias=True
    )
    assert got[2] == 0
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert (want[:2] > 1).all()


def equations(jaxpr):
    """All of them, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_masks_choose_and_never_multiply():
    """A product with a mask keeps NaN on the chip; on a CPU no result shows it, for XLA makes it a choice."""
    given = *arrays(2, 70, 24, 40), random_groups(2, 70, 3)
    with backend.interpret_mode():
        jaxpr = jax.make_jaxpr(functools.partial(ghost_norm_sq, implementation="triton"))(*given).jaxpr
    casts = [e for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
    masks = [e.outvars[0].aval.dtype for e in casts if e.invars[0].aval.dtype == bool]
    assert masks and jnp.float32 not in masks


@IMPLEMENTATIONS
def test_one_group_is_no_group(implementation):
    a, g = arrays(2, 150, 24, 40)
    ones = jnp.full((2, 150), 5, jnp.int32)
    got = norms(a, g, ones, implementation=implementation, bias=True)
    np.testing.assert_allclose(got, norms(a, g, implementation=implementation, bias=True), rtol=2e-6)


@IMPLEMENTATIONS
def test_groups_may_be_of_any_integers(implementation):
    (a, g), groups = arrays(2, 70, 24, 40), random_groups(2, 70, 3)
    want = norms(a, g, groups, implementation=implementation)
    np.testing.assert_array_equal(norms(a, g, groups.astype(jnp.int8), implementation=implementation), want)
    spread = jnp.where(groups < 0, -(2**30), groups * 2**29)
    np.testing.assert_array_equal(norms(a, g, spread, implementation=implementation), want)


@WAYS
@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
def test_the_order_of_rows_is_rounding(pairs, grouped):
    a, g = arrays(2, 150, 40, 24)
    groups = random_groups(2, 150, 3) if grouped else None
    order = np.random.default_rng(1).permutation(150)
    got, moved = (
        norms(*given, pairs=pairs, bias=True)
        for given in ((a, g, groups), [None if x is None else x[:, order] for x in (a, g, groups)])
    )
    np.testing.assert_allclose(got, moved, rtol=2e-6)


@WAYS
@IMPLEMENTATIONS
def test_an_examples_norm_is_its_own(implementation, pairs):
    """To the bit, whatever the other examples are: what the sensitivity of a clipped sum stands on."""
    before, after = arrays(3, 70, 40, 24), arrays(3, 70, 40, 24, seed=1)
    mixed = [jnp.concatenate([x[:1], jnp.full_like(x[:1], jnp.nan), y[2:]]) for x, y in zip(before, after, strict=True)]
    got = [norms(*given, implementation=implementation, pairs=pairs, bias=True) for given in (before, mixed)]
    assert got[0][0] == got[1][0] and got[0][2] != got[1][2] and np.isnan(got[1][1])


@IMPLEMENTATIONS
@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
def test_terms_that_cancel_leave_nothing_below_zero(implementation, grouped):
    """Or the norm would be NaN. Rows alike, and gradients that sum to zero: the pairs' terms are all that is left."""
    a, g = arrays(40, 128, 200, 200)
    a = jnp.broadcast_to(a[:, :1], a.shape)
    g = g - jnp.mean(g, axis=1, keepdims=True)
    groups = jnp.zeros((40, 128), jnp.int32) if grouped else None
    got = norms(a, g, groups, implementation=implementation, pairs=True)
    assert (got >= 0).all()
    assert got.max() < 1e-6 * 128**2 * 200 * 200


def cancelling(T, dtype, seed=0):
    """Rows whose products cancel to a part of 1 to 1e-4 of their terms; the last examples have equal signs instead."""
    a, g = arrays(40, T, 72, 56, "float32", seed)
    left = 10.0 ** -jnp.linspace(0, 4, 40)[:, None, None]
    a = a[:, :1] + left * a
    g = g - (1 - left) * jnp.mean(g, axis=1, keepdims=True)
    a, g = (x.at[30:].set(jnp.abs(x[30:])) for x in (a, g))
    return a.astype(dtype), g.astype(dtype)


@IMPLEMENTATIONS
@WAYS
@pytest.mark.parametrize("T, dtype", [(37, "float32"), (256, "bfloat16"), (1, "float32")])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_bound_is_above_the_norm_whatever_cancels(implementation, pairs, T, dtype, bias):
    """Of the exact gradient, and of the one that clip_reduce adds; and no further above than rounding is."""
    if implementation == "triton" and T == 1:
        pytest.skip("the kernel refuses one row an example, which XLA does as well")
    a, g = cancelling(T, dtype)
    of_bias = np.square(np.asarray(g.astype(jnp.float32), np.float64).sum(axis=1)).sum(axis=1) if bias else 0
    want = squares(gradients(a, g)) + of_bias
    measured, bound = both(a, g, implementation=implementation, pairs=pairs, bias=bias)
    assert (bound >= want).all()
    clipped = run(jax.vmap(lambda a, g: clip_reduce(a[None], g[None], jnp.ones(1), implementation="xla")), a, g)
    assert (bound >= squares(np.asarray(clipped, np.float64)) + of_bias).all()
    lengths = [np.linalg.norm(np.asarray(x.astype(jnp.float32), np.float64), axis=2) for x in (a, g)]
    spread = np.sum(np.sqrt(np.square(lengths[0]) + bias) * lengths[1], axis=1)
    error = 2.0**-23 * (72 + 56 + 4 * T + 8)  # an example's terms are in sums of so many
    assert (bound <= np.square(np.sqrt(want + 2 * error * spread**2) + 2 * error * spread) * (1 + 2 * error)).all()
    if pairs and T == 256:
        assert (measured < want).any()  # the squares alone are not a bound


@IMPLEMENTATIONS
def test_a_bound_of_experts_is_that_of_each_ones_gradient(implementation):
    a, g = cancelling(128, "float32")
    groups = random_groups(40, 128, 3)
    gone = (groups < 0)[:, :, None]
    a, g = (jnp.where(gone, jnp.nan, x) for x in (a, g))
    want = sum(squares(gradients(*(jnp.where((groups == e)[:, :, None], x, 0) for x in (a, g)))) for e in range(3))
    measured, bound = both(a, g, groups, implementation=implementation)
    assert (bound >= want).all() and (measured < want).any()
    assert (bound[0] < 1.01 * want[0]) and not np.isnan(bound).any()


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
def test_gradient_is_the_definitions(implementation, grouped):
    """By the chain rule: d_a_t = 2 sum_s <g_t, g_s> a_s, and so for g; nothing for rows that do not count."""
    a, g = arrays(2, 6, 8, 10)
    groups = jnp.array([[0, 0, 1, -1, 1, 0], [-1, 2, 2, 2, 0, 0]], jnp.int32) if grouped else None
    weight = jnp.array([1.0, -2.0])
    total = lambda a, g: jnp.sum(weight * ghost_norm_sq(a, g, groups, implementation=implementation)[0])
    d_a, d_g = run(jax.grad(total, argnums=(0, 1)), a, g)
    same = np.ones((2, 6, 6)) if groups is None else (groups[:, :, None] == groups[:, None]) & (groups >= 0)[:, :, None]
    for got, x, other in ((d_a, a, g), (d_g, g, a)):
        x64, other64 = (np.asarray(y, np.float64) for y in (x, other))
        gram = np.where(same, np.einsum("btf,bsf->bts", other64, other64), 0)
        want = 2 * np.asarray(weight)[:, None, None] * np.einsum("bts,bsd->btd", gram, x64)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# Clipped sums.


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("sizes", [(5, 37, 24, 40), (3, 1, 24, 40)], ids=str)
def test_an_example_of_factor_zero_adds_nothing(implementation, poison, sizes):
    """To the bit, whatever it holds; a factor of -0 is one of 0, a negative one is not, nor is NaN."""
    a, g = arrays(*sizes)
    B = sizes[0]
    c = -jnp.arange(B, dtype=jnp.float32).at[1].set(0.0)
    gone = (jnp.arange(B) < 2)[:, None, None]
    got, want = (
        sums(*(jnp.where(gone, jnp.array(value, x.dtype), x) for x in (a, g)), c, implementation=implementation)
        for value in (poison, 0)
    )
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, np.einsum("b,bdf->df", c, gradients(a, g)), rtol=1e-5, atol=1e-5)
    assert not sums(a, g, jnp.zeros(B), implementation=implementation).any()
    assert np.isnan(sums(a, g, c.at[0].set(jnp.nan), implementation=implementation)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_clipped_example_keeps_its_bound(dtype):
    """To 1e-6 in any dtype: c g rounded to bfloat16 would miss by some 1e-3 an element."""
    a, g = arrays(1, 70, 136, 72, dtype)
    for _ in range(2):
        a, g = (x * jnp.array(3.0, x.dtype) for x in (a, g))
        c = 0.7 / jnp.sqrt(jnp.asarray(norms(a, g)))
        clipped = sums(a, g, c)
        np.testing.assert_allclose(np.linalg.norm(np.asarray(clipped, np.float64)), 0.7, rtol=1e-6)
        want = np.asarray(c, np.float64)[0] * gradients(a, g)[0]
        np.testing.assert_allclose(clipped, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_programs_that_share_examples_take_each_once(splits):
    a, g = arrays(7, 20, 72, 40)
    c = jnp.asarray(2.0 ** np.arange(7), jnp.float32)
    with mock.patch.object(triton, "_splits", lambda *sizes: splits):
        got = sums(a, g, c)
    want = np.einsum("b,bdf->df", c, gradients(a, g))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_programs_share_examples_where_tiles_are_few():
    """Up to one a core; with 512 rows each, and an example, at least."""
    with jax.sharding.use_abstract_mesh(H200):
        got = [
            triton._splits(*given)
            for given in [(324, 32, 256), (44, 32, 256), (36, 3, 256), (1, 512, 256), (1, 2, 4096)]
        ]
    assert got == [1, 3, 1, 8, 2]


@IMPLEMENTATIONS
def test_gradient_to_factors_is_the_product_with_the_examples_own(implementation):
    a, g = arrays(3, 6, 8, 10)
    c, d_out = jnp.array([0.5, 0.0, -2.0]), jnp.cos(jnp.arange(80.0)).reshape(8, 10)
    total = lambda *given: jnp.sum(d_out * clip_reduce(*given, implementation=implementation))
    d_a, d_g, d_c = run(jax.grad(total, argnums=(0, 1, 2)), a, g, c)
    want = np.einsum("bdf,df->b", gradients(a, g), d_out)
    np.testing.assert_allclose(d_c, [want[0], 0, want[2]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_a, np.einsum("b,btf,df->btd", c, g, d_out), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_g, np.einsum("b,btd,df->btf", c, a, d_out), rtol=1e-5, atol=1e-5)


# Both.


@pytest.mark.parametrize(
    "over", [jax.vmap, lambda f: functools.partial(jax.lax.map, lambda xs: f(*xs))], ids=["vmap", "map"]
)
@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
def test_a_stack_of_layers_is_each_layer(over, grouped):
    """As a scan over layers leaves inputs and gradients: stacked."""
    layers = [arrays(3, 37, 24, 40, seed=i) for i in range(3)]
    groups = [random_groups(3, 37, 3, seed=i) for i in range(3)] if grouped else None
    c = jnp.array([0.5, 0.0, 2.0])
    stacked = [jnp.stack(x) for x in zip(*layers, strict=True)]

    def each(a, g, groups=None):
        norm, _ = ghost_norm_sq(a, g, groups, bias=True, implementation="triton")
        return norm, clip_reduce(a, g, c, implementation="triton")

    mapped = over(each)
    given = [*stacked, *([] if groups is None else [jnp.stack(groups)])]
    got = run((lambda *xs: mapped(xs)) if over is not jax.vmap else mapped, *given)
    for i, (a, g) in enumerate(layers):
        want, _ = ghost_norm_sq(a, g, None if groups is None else groups[i], bias=True, implementation="xla")
        np.testing.assert_allclose(got[0][i], want, rtol=2e-6)
        np.testing.assert_allclose(got[1][i], clip_reduce(a, g, c, implementation="xla"), rtol=1e-5, atol=1e-4)


def sizes_in(jaxpr):
    """Elements of every array that is made, however deep, but not inside a kernel."""
    for equation in jaxpr.eqns:
        inside = list(jax.extend.core.jaxprs_in_params(equation.params))
        if not inside or equation.primitive.name == "pallas_call":
            yield from (v.aval.size for v in equation.outvars)
        else:  # a call, which may return its own arguments
            for inner in inside:
                yield from sizes_in(inner)


@pytest.mark.parametrize("name", ["dit_xl2_up", "dit_xl2_1024_out", "dit_s2_1024_up", "lora_r16", "dit_moe_xl_up"])
@IMPLEMENTATIONS
def test_nothing_in_memory_is_larger_than_the_inputs(implementation, name):
    """B matrices D x F, of DiT-XL/2's MLP 85 million numbers, would be; the kernels keep next to nothing."""
    case = GHOST_NORM_SQ.cases[name]
    with backend.interpret_mode():
        call = functools.partial(GHOST_NORM_SQ, implementation=implementation, bias=False)
        jaxpr = jax.make_jaxpr(call)(*case.arrays).jaxpr
    inputs = sum(x.size for x in case.arrays[:2])
    assert max(sizes_in(jaxpr)) <= (inputs if implementation == "xla" else inputs // 256)


def test_clipped_sum_keeps_no_examples_gradient():
    case = CLIP_REDUCE.cases["dit_s2_1024_up"]
    with backend.interpret_mode():
        jaxpr = jax.make_jaxpr(functools.partial(CLIP_REDUCE, implementation="triton"))(*case.arrays).jaxpr
    B, _, D = case.arrays[0].shape
    assert max(sizes_in(jaxpr)) <= triton.MOST_SPLITS * D * case.arrays[1].shape[2] < B * D * case.arrays[1].shape[2]


def test_cost_counts_the_pairs_of_a_group_where_it_knows_them():
    a, g = arrays(2, 4, 64, 32)
    groups = jnp.array([[0, 0, 1, -1], [2, 2, 2, -1]], jnp.int32)
    known, unknown, none = (
        cost.ghost_norm_sq(a, g, x, bias=False) for x in (groups, jax.ShapeDtypeStruct((2, 4), jnp.int32), None)
    )
    assert known.flops == 2 * (3 + 1 + 6 + 6) * (64 + 32)  # pairs of the groups, and rows
    assert unknown.flops == none.flops == 2 * 2 * (10 + 4) * (64 + 32)
    assert known.bytes == unknown.bytes == none.bytes + 4 * 8 == 4 * 8 * (64 + 32) + 8 * 2 + 4 * 8
    tall = [jax.ShapeDtypeStruct((2, 512, 8), jnp.float32)] * 2
    assert cost.ghost_norm_sq(*tall, None, bias=False).flops == 2 * 2 * 512 * (8 * 8 + 8 + 8)


def test_tiles_are_no_larger_than_the_matrix():
    """LoRA's is 16 wide, and of one row a contraction has few; a short example has small tiles of pairs."""
    shaped = lambda *widths: [jax.ShapeDtypeStruct((4, *w), jnp.bfloat16) for w in widths]
    with jax.sharding.use_abstract_mesh(H200):
        lora = blocks_for("matrix", *shaped((256, 1152), (256, 16)))
        back = blocks_for("clip", *shaped((1, 16), (1, 1152)))
        pairs = [blocks_for("pairs", *shaped((T, 1152), (T, 3456))).rows for T in (37, 1024)]
    assert (lora.rows, lora.columns, lora.depth, back.rows, back.columns, back.depth) == (128, 16, 64, 64, 128, 16)
    assert pairs == [64, 128]


def test_one_row_an_example_is_left_to_xla():
    a, g = arrays(3, 1, 24, 40)
    with backend.interpret_mode(), pytest.raises(NotImplementedError, match="at least two rows .* got T = 1"):
        ghost_norm_sq(a, g, implementation="triton")
    jaxpr = jax.make_jaxpr(functools.partial(ghost_norm_sq, bias=True))(a, g)
    assert "dot_general" not in str(jaxpr)


A, G = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5))


@pytest.mark.parametrize(
    "function, given, words",
    [
        (ghost_norm_sq, (A, G[:, :2]), r"a \(2, 3, 4\) and g \(2, 2, 5\) do not fit; give a as \(B, T, D\) and g as"),
        (ghost_norm_sq, (A[0], G[0]), r"a \(3, 4\) and g \(3, 5\) do not fit"),
        (ghost_norm_sq, (A[:, :0], G[:, :0]), "must have no dimension of size 0"),
        (
            ghost_norm_sq,
            (A, G, jnp.zeros((2, 4), jnp.int32)),
            r"groups must be one number per row, \(B, T\) = \(2, 3\)",
        ),
        (ghost_norm_sq, (A, G, jnp.zeros((2, 3))), "groups must be integers, got float32; cast them to int32"),
        (clip_reduce, (A, G[:1], jnp.zeros(2)), r"a \(2, 3, 4\) and g \(1, 3, 5\) do not fit"),
        (clip_reduce, (A, G, jnp.zeros(3)), r"c must be one number per example, \(B,\) = \(2,\), got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(function, given, words, unchecked_arrays):
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*{words}"):
        function(*given)


def test_two_dtypes_are_xlas():
    a, g = arrays(2, 5, 8, 8)
    for op, rest, static in ((GHOST_NORM_SQ, (None,), {"bias": False}), (CLIP_REDUCE, (jnp.ones(2),), {})):
        with (
            backend.interpret_mode(),
            pytest.raises(NotImplementedError, match="one dtype among .* got float32 and bf"),
        ):
            op(a, g.astype(jnp.bfloat16), *rest, implementation="triton", **static)
