"""What the experts' ops promise beyond test_ops.py, held against loops over experts in numpy float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import backend, combine, dispatch, expert_mlp, grouped_matmul, to_slots, top_k_softmax
from kernels_pallas.experts import cases, triton, triton_mlp
from kernels_pallas.experts.tiles import row_tiles


pytestmark = pytest.mark.recorded


R, D, F, E = 150, 24, 40, 5
IMPLEMENTATIONS = ["xla", "triton"]


def random(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.cache
def compiled(implementation: str, dtype: str):
    """(x, w, sizes, d_y) -> y, d_x, d_w of one size: group sizes are data, so it compiles once."""

    def run(x, w, sizes, d_y):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *vjp(d_y)

    shapes = [((R, D), dtype), ((E, D, F), dtype), ((E,), "int32"), ((R, F), dtype)]
    with backend.interpret_mode():
        return jax.jit(run).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


def by_loop(x, w, sizes, d_y):
    """The three products, expert by expert."""
    x, w, d_y = (np.asarray(a, np.float64) for a in (x, w, d_y))
    y, d_x, d_w = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:end] = x[start:end] @ w[e]
        d_x[start:end] = d_y[start:end] @ w[e].T
        d_w[e] = x[start:end].T @ d_y[start:end]
    return y, d_x, d_w


@st.composite
def group_sizes(draw):
    """Any sizes that fit: often some are zero, often the sum is R, or nothing."""
    edges = draw(st.lists(st.integers(0, R), min_size=E, max_size=E))
    edges = sorted(edges[:-1] + [draw(st.sampled_from([R, edges[-1], max(edges)]))])
    return np.diff([0, *edges]).astype(np.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(sizes=group_sizes())
def test_any_group_sizes_give_what_a_loop_gives_and_nan_in_other_rows_stays_there(implementation, sizes):
    x, w, d_y = random((R, D)), random((E, D, F), seed=1), random((R, F), seed=2)
    total = sizes.sum()
    x, d_y = x.at[total:].set(jnp.nan), d_y.at[total:].set(jnp.nan)
    got = compiled(implementation, "float32")(x, w, jnp.asarray(sizes), d_y)
    for mine, truth in zip(got, by_loop(x.at[total:].set(0), w, sizes, d_y.at[total:].set(0)), strict=True):
        # Sums of up to 150 products of standard normal numbers, each rounded to 24 bits.
        np.testing.assert_allclose(mine, truth, atol=150 * 2**-23 * 3)
    y, d_x, d_w = got
    np.testing.assert_array_equal(y[total:], 0)
    np.testing.assert_array_equal(d_x[total:], 0)
    np.testing.assert_array_equal(d_w[sizes == 0], 0)


@pytest.mark.parametrize("load", ["even", "random", "zipf", "one", "half"])
def test_no_expert_of_bfloat16_is_off_by_more_than_its_rounding(load):
    """Per expert: an error in one of them is small beside all of them. The bound is half again what rounding makes."""
    x, w, d_y = random((R, D), "bfloat16"), random((E, D, F), "bfloat16", 1), random((R, F), "bfloat16", 2)
    sizes = cases.group_sizes(load, R, E)
    truth = by_loop(x, w, sizes, d_y)
    got = [np.asarray(a, np.float64) for a in compiled("triton", "bfloat16")(x, w, jnp.asarray(sizes), d_y)]
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        places = (slice(start, end), slice(start, end), e)
        for mine, wanted, place in zip(got, truth, places, strict=True):
            if sizes[e]:
                error = np.linalg.norm(mine[place] - wanted[place]) / np.linalg.norm(wanted[place])
                assert error <= 3e-3, (load, e, error)


def mlp_by_loop(x, routing, w_gate_up, w_down):
    """float64, one row after the other."""
    x, w_gate_up, w_down = (np.asarray(a, np.float64) for a in (x, w_gate_up, w_down))
    out = np.zeros(x.shape)
    for row, e in enumerate(np.repeat(np.arange(len(w_down)), routing.group_sizes)):
        gate, up = np.split(x[routing.row_index[row]] @ w_gate_up[e], 2)
        y = (gate / (1 + np.exp(-gate)) * up) @ w_down[e]
        out[routing.row_index[row]] += float(routing.row_weight[row]) * y
    return out


@pytest.mark.parametrize("load", ["random", "half", "one"])
def test_the_definition_of_the_mlp_is_a_loop_over_rows(load):
    x, w_gate_up, w_down = random((30, D)), random((E, D, 2 * F), seed=1), random((E, F, D), seed=2)
    routing = cases.routing_of(load, 30, E, 2)
    got = expert_mlp(x, routing, w_gate_up, w_down, implementation="xla")
    want = mlp_by_loop(x, routing, w_gate_up, w_down)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("active", [1, E])
def test_one_expert_a_token_and_all_of_them(active):
    """Each token at `active` experts, with weights of its own: by the kernels."""
    T = 20
    x, w_gate_up, w_down = random((T, D)), random((E, D, 2 * F), seed=1) * 0.2, random((E, F, D), seed=2) * 0.2
    rng = np.random.default_rng(3)
    experts = np.stack([rng.permutation(E)[:active] for _ in range(T)])
    lists = np.repeat(np.arange(T), active), experts.reshape(-1), rng.uniform(size=T * active)
    token, expert, weight = (jnp.asarray(a, t) for a, t in zip(lists, ("int32", "int32", "float32"), strict=True))
    routing = kernels_pallas.Assignments(token, expert, weight, num_tokens=T, num_experts=E).route()
    with backend.interpret_mode():
        got = jax.jit(functools.partial(expert_mlp, implementation="triton"))(x, routing, w_gate_up, w_down)
    want = mlp_by_loop(x, routing, w_gate_up, w_down)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_the_mlp_keeps_its_inputs_and_what_is_before_the_activation_and_nothing_else():
    case = cases.EXPERT_MLP["dit_moe_xl"]
    with backend.interpret_mode():
        _, residuals = jax.eval_shape(triton_mlp.forward, *case.arrays)
    kept = sorted((a.shape, a.dtype.name) for a in jax.tree.leaves(residuals))
    inputs = [(a.shape, a.dtype.name) for a in jax.tree.leaves(case.arrays)]
    assert kept == sorted([*inputs, ((8192 * 2, 2 * 4608), "bfloat16")])


def test_gradient_of_each_example_with_shared_experts():
    """As private training takes it: x and routing of each example, the experts' matrices of all."""
    T, batch = 20, 3
    x, w_gate_up, w_down = random((batch, T, D)), random((E, D, 2 * F), seed=1) * 0.2, random((E, F, D), seed=2) * 0.2
    routing = jax.tree.map(
        lambda *rows: jnp.stack(rows), *(cases.routing_of(load, T, E, 2) for load in ("random", "zipf", "half"))
    )

    def loss(w_gate_up, w_down, x, routing, implementation):
        return jnp.sum(jnp.sin(expert_mlp(x, routing, w_gate_up, w_down, implementation=implementation)))

    def gradients(implementation):
        gradient = jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1))
        return jax.jit(jax.vmap(gradient, in_axes=(None, None, 0, 0)))(w_gate_up, w_down, x, routing)

    with backend.interpret_mode():
        got = gradients("triton")
    for mine, wanted in zip(got, gradients("xla"), strict=True):
        assert mine.shape[0] == batch
        np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max())


def test_kernels_on_a_mesh_gather_nothing():
    """Rows and experts of each of eight devices, forward and backward, under shard_map."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("expert",))
    x, w, sizes = random((8 * R, D)), random((8 * E, D, F), seed=1), jnp.tile(cases.group_sizes("zipf", R, E), 8)
    place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("expert")))
    local = jax.shard_map(
        functools.partial(grouped_matmul, implementation="triton"), mesh=mesh,
        in_specs=(jax.P("expert"),) * 3, out_specs=jax.P("expert"), check_vma=False,
    )  # fmt: skip
    with backend.interpret_mode():
        step = jax.jit(jax.grad(lambda x, w, s: jnp.sum(local(x, w, s) ** 2), argnums=(0, 1)))
        run = step.lower(place(x), place(w), place(sizes)).compile()
    got = run(place(x), place(w), place(sizes))
    assert "all-gather" not in str(run.as_text())
    for device in (0, 7):
        mine, matrices = x[device * R : (device + 1) * R], w[device * E : (device + 1) * E]
        want = jax.grad(lambda *a: jnp.sum(grouped_matmul(*a, implementation="xla") ** 2), argnums=(0, 1))(
            mine, matrices, sizes[:E]
        )
        np.testing.assert_allclose(got[0][device * R : (device + 1) * R], want[0], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(got[1][device * E : (device + 1) * E], want[1], rtol=1e-4, atol=1e-3)


def test_dispatch_and_combine_undo_each_other():
    """With weights that sum to 1 a token that is sent to its experts comes back."""
    routing = cases.routing_of("random", 30, E, 2)
    weight = 1 / routing.token_sizes[routing.row_index]
    routing = kernels_pallas.Routing(
        routing.row_index, routing.group_sizes, weight.astype(jnp.float32), routing.inverse, routing.token_sizes
    )
    x = random((30, D))
    with backend.interpret_mode():
        back = jax.jit(
            lambda x: combine(dispatch(x, routing, implementation="triton"), routing, implementation="triton")
        )(x)
    np.testing.assert_allclose(back, x, rtol=1e-6)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=group_sizes(), block=st.sampled_from([16, 32, 64]), rest=st.booleans(), align=st.sampled_from([1, 8])
)
def test_tiles_cover_each_row_once_and_are_as_few_as_can_be_listed(sizes, block, rest, align):
    tiles = jax.tree.map(np.asarray, row_tiles(jnp.asarray(sizes), R, block, rest=rest, align=align))
    assert align > 1 or tiles.start.size == -(-R // block) + E - (not rest)
    assert (tiles.stop <= tiles.start // align * align + block).all()
    owner = np.full(R, -1)
    for expert, start, stop in zip(tiles.expert, tiles.start, tiles.stop, strict=True):
        assert 0 <= stop - start <= block
        assert (owner[start:stop] == -1).all()
        owner[start:stop] = expert
    want = np.repeat(np.arange(E), sizes)
    np.testing.assert_array_equal(owner, np.pad(want, (0, R - len(want)), constant_values=E if rest else -1))


def test_rows_of_few_experts_are_shared_between_programs():
    """Else test_ops.py's case for it would show nothing."""
    case = cases.GROUPED_MATMUL["tiny_split"]
    assert triton._splits(programs=2, rows=case.arrays[0].shape[0] // 2) == 2
    assert triton._splits(programs=8 * 9 * 36, rows=2048) == 1


def test_what_programs_add_up_of_one_weight_gradient_is_float32():
    """Their own dtype would round each part before the sum."""
    arrays = [jax.ShapeDtypeStruct((2100, size), jnp.bfloat16) for size in (24, 40)]
    make = jax.make_jaxpr(functools.partial(triton.weight_gradient, kernel="dw"))
    with backend.interpret_mode():
        text = str(make(*arrays, jax.ShapeDtypeStruct((2,), jnp.int32)))
    assert "f32[2,2,24,40]" in text and "bf16[2,2,24,40]" not in text


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("capacity", [9, 40])
def test_rows_in_slots_give_what_they_give_side_by_side(implementation, capacity):
    """Slots of some experts are empty; some choices are dropped at 9 (of 80), none at 40."""
    x, d_out, logits = random((40, D)), random((40, D), seed=1), random((40, E), seed=2).at[:, 0].add(2)
    weights = random((E, D, 2 * F), seed=3), random((E, F, D), seed=4)

    def run(slots, implementation):
        def loss(x, logits, w_gate_up, w_down):
            kept, dropped = top_k_softmax(logits, active=2).within(capacity)
            routing = to_slots(kept.route(), capacity) if slots else kept.route()
            rows = dispatch(x, routing, implementation=implementation)
            y = expert_mlp(x, routing, w_gate_up, w_down, implementation=implementation)
            return jnp.sum(d_out * (y + combine(rows, routing, implementation=implementation))), dropped

        with backend.interpret_mode():
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
            return step(x, logits, *weights)

    ((want, dropped), wanted), ((got, _), gradients) = run(False, "xla"), run(True, implementation)
    assert (dropped > 0) == (capacity == 9)
    for mine, its in zip((got, *gradients), (want, *wanted), strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=1e-5 * float(jnp.abs(its).max()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=(R, D + 1)), r"x float32 \(150, 25\), w float32 \(5, 24, 40\).* give x as \(R, D\)"),
        (dict(sizes=(E + 1,)), r"group_sizes \(6,\)"),
        (dict(dtype="bfloat16"), "x bfloat16"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change, words, unchecked_arrays):
    x = jnp.zeros(change.get("x", (R, D)), change.get("dtype", "float32"))
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, jnp.zeros((E, D, F)), jnp.zeros(change.get("sizes", (E,)), jnp.int32))


def test_a_routing_for_other_tokens_is_refused():
    routing = cases.routing_of("random", 30, E, 2)
    with pytest.raises(ValueError, match="the routing has 30 tokens, the array has 31"):
        dispatch(jnp.zeros((31, D)), routing)
    with pytest.raises(ValueError, match="the routing has 60 rows, the array has 30"):
        combine(jnp.zeros((30, D)), routing)
    with pytest.raises(ValueError, match=r"w_down float32 \(5, 40, 24\) and 5 experts .* do not fit"):
        expert_mlp(jnp.zeros((30, D)), routing, jnp.zeros((E, D, F)), jnp.zeros((E, F, D)))
