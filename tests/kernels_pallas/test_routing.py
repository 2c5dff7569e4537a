"""Routing: what routers choose, against loops in numpy; what a Routing says of it; and how loads are counted."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    Assignments,
    by_index,
    expert_choice,
    expert_load,
    expert_mlp,
    load_balance_loss,
    race,
    sigmoid_scores,
    softmax_scores,
    top_k_sigmoid,
    top_k_softmax,
    update_bias,
    z_loss,
)


pytestmark = pytest.mark.recorded


T, E, D, F = 23, 7, 12, 20
ROUTERS = {
    "softmax_1": functools.partial(top_k_softmax, active=1),
    "softmax_3": functools.partial(top_k_softmax, active=3, normalize=True),
    "softmax_all": functools.partial(top_k_softmax, active=E),
    "sigmoid": functools.partial(top_k_sigmoid, bias=jnp.linspace(-0.3, 0.3, E), active=2, scale=2.5),
    "expert_choice": functools.partial(expert_choice, rows=5),
    "race": functools.partial(race, rows=40),
}
every_router = pytest.mark.parametrize("router", ROUTERS)


def logits_of(seed=0, shape=(T, E)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def choices(assignments) -> set[tuple[int, int]]:
    pairs = list(zip(assignments.token.tolist(), assignments.expert.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Rows.


@st.composite
def lists(draw):
    """Token and expert of up to 40 choices in any order, some of no expert."""
    n = draw(st.integers(1, 40))
    ints = lambda most: st.lists(st.integers(0, most), min_size=n, max_size=n)
    return draw(ints(5)), draw(ints(4))


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(lists=lists())
def test_a_routing_holds_each_choice_once_by_expert_and_by_token(lists):
    token, expert = (np.array(a, np.int32) for a in lists)
    weight = np.arange(1, len(token) + 1, dtype=np.float32)  # tells the choices apart
    assignments = Assignments(*map(jnp.asarray, (token, expert, weight)), num_tokens=6, num_experts=4)
    routing = jax.tree.map(np.asarray, assignments.route())
    want = [i for e in range(4) for i in range(len(token)) if expert[i] == e]  # stable
    total = len(want)
    np.testing.assert_array_equal(routing.group_sizes, [(expert == e).sum() for e in range(4)])
    np.testing.assert_array_equal(assignments.rows_of_experts(), routing.group_sizes)
    np.testing.assert_array_equal(routing.row_index[:total], token[want])
    np.testing.assert_array_equal(routing.row_weight, [*weight[want], *[0] * (len(token) - total)])
    assert ((routing.row_index >= 0) & (routing.row_index < 6)).all()
    assert sorted(routing.inverse) == list(range(len(token)))
    first = 0
    for t in range(6):
        rows = routing.inverse[first : first + routing.token_sizes[t]]
        assert list(rows) == [r for r in range(total) if routing.row_index[r] == t]
        first += routing.token_sizes[t]
    assert first == total


def test_pools_are_joined_end_to_end():
    pools = jax.vmap(functools.partial(top_k_softmax, active=2))(logits_of(shape=(3, T, E)))
    joined = pools.joined()
    assert joined.num_tokens == 3 * T
    for p in range(3):
        mine = top_k_softmax(logits_of(shape=(3, T, E))[p], active=2)
        part = slice(p * 2 * T, (p + 1) * 2 * T)
        np.testing.assert_array_equal(joined.token[part], mine.token + p * T)
        np.testing.assert_array_equal(joined.expert[part], mine.expert)
        np.testing.assert_array_equal(joined.weight[part], mine.weight)


# Routers.


@pytest.mark.parametrize("active", [1, 3, E])
def test_softmax_takes_the_highest_of_each_token(active):
    logits = np.asarray(logits_of(), np.float64)
    got = top_k_softmax(logits_of(), active=active)
    assert choices(got) == {(t, e) for t in range(T) for e in np.argsort(-logits[t])[:active]}
    np.testing.assert_allclose(got.weight, softmax(logits)[got.token, got.expert], rtol=1e-6)
    normal = top_k_softmax(logits_of(), active=active, normalize=True).weight.reshape(T, active)
    np.testing.assert_allclose(normal.sum(axis=1), 1, rtol=1e-6)


def test_sigmoid_chooses_with_the_bias_and_weighs_without():
    logits, bias = np.asarray(logits_of(), np.float64), np.linspace(-1, 1, E)
    score = 1 / (1 + np.exp(-logits))
    got = top_k_sigmoid(logits_of(), jnp.asarray(bias, jnp.float32), active=2, scale=2.5)
    want = {t: np.argsort(-(score[t] + bias))[:2] for t in range(T)}
    assert choices(got) == {(t, e) for t, chosen in want.items() for e in chosen}
    assert choices(got) != choices(top_k_sigmoid(logits_of(), jnp.zeros(E), active=2))
    total = np.array([score[t][want[t]].sum() for t in range(T)])
    np.testing.assert_allclose(got.weight, 2.5 * score[got.token, got.expert] / total[got.token], rtol=1e-5)


def test_sigmoid_stays_in_the_groups_with_the_two_best():
    logits = np.asarray(logits_of(shape=(T, 12)), np.float64)
    got = top_k_sigmoid(logits_of(shape=(T, 12)), jnp.zeros(12), active=4, groups=4, active_groups=2)
    score = 1 / (1 + np.exp(-logits))
    want = set()
    for t in range(T):
        of_group = np.sort(score[t].reshape(4, 3), axis=1)[:, -2:].sum(axis=1)
        chosen = np.argsort(-of_group)[:2]
        inside = np.where(np.isin(np.arange(12) // 3, chosen), score[t], -1)
        want |= {(t, e) for e in np.argsort(-inside)[:4]}
    assert choices(got) == want


def test_experts_choose_their_tokens():
    score = softmax(np.asarray(logits_of(), np.float64))
    got = expert_choice(logits_of(), rows=5)
    assert choices(got) == {(t, e) for e in range(E) for t in np.argsort(-score[:, e])[:5]}
    np.testing.assert_allclose(got.weight, score[got.token, got.expert], rtol=1e-6)
    assert (np.diff(got.token.reshape(E, 5), axis=1) > 0).all(), "in the order of memory"


def test_the_race_is_won_by_the_highest_of_all_scores():
    score = softmax(np.asarray(logits_of(), np.float64))
    got = race(logits_of(), rows=40)
    assert choices(got) == {divmod(int(i), E) for i in np.argsort(-score.reshape(-1))[:40]}
    np.testing.assert_allclose(got.weight, score[got.token, got.expert], rtol=1e-6)
    assert len(np.unique(np.bincount(got.token, minlength=T))) > 1, "tokens have different numbers of experts"


def test_hard_routing_does_as_told():
    index = jnp.asarray([2, 0, E, 2, 1], jnp.int32)
    routing = by_index(index, num_experts=E).route()
    np.testing.assert_array_equal(routing.group_sizes, [1, 1, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(routing.row_index[:4], [1, 4, 0, 3])
    np.testing.assert_array_equal(routing.row_weight, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(routing.token_sizes, [1, 1, 0, 1, 1])


def test_of_equal_scores_the_lowest_index_wins():
    level = jnp.zeros((T, E))
    assert choices(top_k_softmax(level, active=3)) == {(t, e) for t in range(T) for e in range(3)}
    assert choices(top_k_sigmoid(level, jnp.zeros(E), active=2)) == {(t, e) for t in range(T) for e in range(2)}
    assert choices(expert_choice(level, rows=4)) == {(t, e) for t in range(4) for e in range(E)}
    assert choices(race(level, rows=E + 2)) == {(0, e) for e in range(E)} | {(1, 0), (1, 1)}
    pair = level.at[:, 2].set(1.0).at[:, 5].set(1.0)
    assert choices(top_k_softmax(pair, active=1)) == {(t, 2) for t in range(T)}


@every_router
def test_pools_are_routed_as_if_alone(router):
    logits = logits_of(shape=(3, T, E))
    together = jax.jit(jax.vmap(ROUTERS[router]))(logits)
    for p in range(3):
        alone = ROUTERS[router](logits[p])
        np.testing.assert_array_equal(together.token[p], alone.token)
        np.testing.assert_array_equal(together.expert[p], alone.expert)
        np.testing.assert_allclose(together.weight[p], alone.weight, rtol=1e-6)


@every_router
def test_gradients_reach_the_logits_through_the_weights(router):
    """Held against finite differences in float64 of the same choices' weights."""
    logits, pull = logits_of(), logits_of(seed=1)
    chosen = ROUTERS[router](logits)
    weigh = lambda a: jnp.sum(a.weight * pull[a.token, a.expert])
    got = jax.grad(lambda x: weigh(ROUTERS[router](x)))(logits)

    def value(x):
        score = softmax(x) if "sigmoid" not in router else 1 / (1 + np.exp(-x))
        weight = score[chosen.token, chosen.expert]
        if router in ("softmax_3", "sigmoid"):
            total = np.bincount(chosen.token, weight, minlength=T)
            weight = (2.5 if router == "sigmoid" else 1.0) * weight / total[chosen.token]
        return float(np.sum(weight * np.asarray(pull, np.float64)[chosen.token, chosen.expert]))

    x, h = np.asarray(logits, np.float64), 1e-5
    step = lambda i: h * (np.arange(x.size) == i).reshape(x.shape)
    want = np.array([(value(x + step(i)) - value(x - step(i))) / (2 * h) for i in range(x.size)]).reshape(x.shape)
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: top_k_softmax(x, active=E + 1), "top_k_softmax: got active=8; wanted 1 to 7 experts per token"),
        (lambda x: top_k_sigmoid(x, x[0], active=2, groups=2), "groups=2; wanted a divisor of 7"),
        (lambda x: top_k_sigmoid(x, x[0], active=2, groups=7), "active=2; wanted 1 to 1 experts"),
        (lambda x: top_k_sigmoid(x, x[0], active=2, active_groups=2), "active_groups=2; wanted 1 to 1"),
        (lambda x: expert_choice(x, rows=T + 1), "rows=24; wanted 1 to 23 tokens per expert"),
        (lambda x: race(x, rows=0), "rows=0; wanted 1 to 161"),
    ],
)
def test_impossible_choices_are_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words):
        call(logits_of())


# What a layer may rely on.


def weights_of_experts():
    rng = np.random.default_rng(5)
    shapes = (T, D), (E, D, 2 * F), (E, F, D)
    return [jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "sigmoid"])  # its bias is of experts in order
def test_the_order_of_experts_and_of_tokens_changes_nothing(router):
    x, gate_up, down = weights_of_experts()
    logits, rng = logits_of(), np.random.default_rng(6)
    result = lambda x, logits, *w: expert_mlp(x, ROUTERS[router](logits).route(), *w, implementation="xla")
    want = np.asarray(result(x, logits, gate_up, down))
    experts, tokens = rng.permutation(E), rng.permutation(T)
    close = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(want).max()
    )  # another order of sums
    close(result(x, logits[:, experts], gate_up[experts], down[experts]), want)
    close(result(x[tokens], logits[tokens], gate_up, down), want[tokens])


def test_identical_experts_with_weights_that_sum_to_one_are_one_mlp():
    x, gate_up, down = weights_of_experts()
    same = lambda w: jnp.broadcast_to(w[:1], w.shape)
    routing = top_k_softmax(logits_of(), active=3, normalize=True).route()
    got = expert_mlp(x, routing, same(gate_up), same(down), implementation="xla")
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    gate, up = np.split(x @ gate_up[0], 2, axis=1)
    want = (gate / (1 + np.exp(-gate)) * up) @ down[0]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


# Loads.


def test_the_balance_loss_is_one_where_loads_are_even_and_grows_with_skew():
    even = jnp.eye(E)[jnp.arange(3 * E) % E] * 1e-6
    balance = lambda x: load_balance_loss(expert_load(top_k_softmax(x, active=1), softmax_scores(x), x))
    np.testing.assert_allclose(balance(even), 1, rtol=1e-5)
    np.testing.assert_allclose(balance(even.at[:, 0].set(30.0)), E, rtol=1e-5)


def test_the_balance_loss_moves_probability_and_not_choices():
    x = logits_of()
    balance = lambda x: load_balance_loss(expert_load(top_k_softmax(x, active=2), softmax_scores(x), x))
    p = softmax(np.asarray(x, np.float64))
    rows = np.bincount(np.argsort(-p, axis=1)[:, :2].reshape(-1), minlength=E)
    f = rows / rows.sum()
    np.testing.assert_allclose(balance(x), E * (f * p.mean(axis=0)).sum(), rtol=1e-5)
    want = E / T * p * (f - (p * f).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(jax.grad(balance)(x), want, atol=1e-7)


def test_the_z_loss_is_the_mean_square_of_logsumexp():
    x = logits_of()
    loss = lambda x: z_loss(expert_load(top_k_softmax(x, active=1), softmax_scores(x), x))
    lse = np.log(np.exp(np.asarray(x, np.float64)).sum(axis=1))
    np.testing.assert_allclose(loss(x), (lse**2).mean(), rtol=1e-5)
    want = 2 * lse[:, None] * softmax(np.asarray(x, np.float64)) / T
    np.testing.assert_allclose(jax.grad(loss)(x), want, rtol=1e-4, atol=1e-6)


def test_loads_of_parts_add_up_to_the_load_of_the_whole():
    x = logits_of(shape=(2 * T, E))
    load = lambda x: expert_load(top_k_softmax(x, active=2), sigmoid_scores(x), x)
    parts = jax.tree.map(jnp.add, load(x[:T]), load(x[T:]))
    for field in dataclasses.fields(parts):
        np.testing.assert_allclose(getattr(parts, field.name), getattr(load(x), field.name), rtol=1e-6)


def test_the_bias_moves_choices_to_experts_that_have_few():
    logits, bias = logits_of(shape=(400, E)) + jnp.linspace(-1, 1, E), jnp.zeros(E)
    rows = lambda bias: top_k_sigmoid(logits, bias, active=2).rows_of_experts()
    worst = lambda rows: float(rows.max() / rows.mean())
    moved = update_bias(bias, rows(bias), rate=0.1)
    np.testing.assert_array_equal(np.sign(moved), np.sign(rows(bias).mean() - rows(bias)))
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-6)
    for _ in range(60):
        bias = update_bias(bias, rows(bias), rate=0.01)
    assert worst(rows(jnp.zeros(E))) > 1.5 and worst(rows(bias)) < 1.1
