"""The MoE layer: equal on one and on eight devices, and independent examples."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.layers.expert_parallel import EXCHANGES, default_exchange
from dito_jax.layers.moe import MoE
from dito_jax.sharding import MeshConfig, make_mesh, shardings, spec
from kernels_pallas import (
    by_index,
    expert_choice,
    load_balance_loss,
    race,
    sigmoid_scores,
    softmax_scores,
    top_k_sigmoid,
    top_k_softmax,
    z_loss,
)


pytestmark = pytest.mark.recorded


B, T, D, F, E = 8, 6, 16, 24, 8
ROUTERS = {
    "softmax": dict(choose=lambda x, bias, index: top_k_softmax(x, active=2), scores=softmax_scores, active=2),
    "sigmoid": dict(
        choose=lambda x, bias, index: top_k_sigmoid(x, bias, active=3, groups=4, active_groups=2),
        scores=sigmoid_scores, active=3, biased=True,
    ),
    "expert_choice": dict(
        choose=lambda x, bias, index: expert_choice(x, rows=2 * len(x) // E), scores=softmax_scores, active=2, even=True
    ),
    "race": dict(choose=lambda x, bias, index: race(x, rows=2 * len(x)), scores=softmax_scores, active=2),
    "by_index": dict(
        choose=lambda x, bias, index: by_index(index, num_experts=E), scores=softmax_scores, active=1, by_index=True
    ),
}  # fmt: skip


@functools.cache
def layer(router: str, **options) -> tuple[nnx.GraphDef, nnx.State]:
    """A layer with random parameters, none of them zero."""
    moe = MoE(D, F, E, **ROUTERS[router], **options, rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
    graph, params = nnx.split(moe, nnx.Param)
    rng = np.random.default_rng(1)
    return graph, jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.3, jnp.float32), params)


def images(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D)), jnp.float32)


INDEX = jnp.arange(B, dtype=jnp.int32) * 3 % E


def step(graph, params, x, pull):
    """Output, report, auxiliary losses, and gradients to the input and all parameters."""

    def loss(params, x):
        y, report = nnx.merge(graph, params)(x, INDEX)
        whole = jax.tree.map(lambda a: a.sum(axis=0), report.load)
        auxiliary = load_balance_loss(whole) + 0.1 * z_loss(whole)
        return jnp.sum(y * pull) + auxiliary, (auxiliary, y, report)

    gradients, said = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return *said, gradients


def on_devices(router, sizes, **options):
    """The same step on a mesh, and its text."""
    graph, params = layer(router, **options)
    mesh = make_mesh(MeshConfig(**sizes), np.array(jax.devices()[: math.prod(sizes.values())]))
    with jax.set_mesh(mesh):
        by_example = jax.NamedSharding(mesh, spec("B", mesh))
        arguments = (
            jax.tree.map(jax.device_put, params, shardings(params, mesh)),
            jax.device_put(images(), by_example),
            jax.device_put(images(seed=2), by_example),
        )
        run = jax.jit(functools.partial(step, graph)).lower(*arguments).compile()
        return run(*arguments), str(run.as_text())


def assert_close(got, want):
    """Float32 sums of a hundred terms in another order."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for mine, wanted in zip(got, want, strict=True):
        wanted = np.asarray(wanted)
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max(initial=0)))


@functools.cache
def alone(router, **options):
    return on_devices(router, {"data": 1}, **options)[0]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("router", ROUTERS)
def test_eight_devices_compute_what_one_does(router, exchange):
    got, text = on_devices(router, {"data": 1, "expert": 8}, exchange=exchange)
    assert_close(got, alone(router, exchange=exchange))
    # E D 2 F and E F D: the matrices of all experts are nowhere together.
    assert not re.search(rf"f32\[{E},(?:{D},2,{F}|{D},{2 * F}|{F},{D})\]", text)


@pytest.mark.parametrize("sizes", [dict(data=4, expert=2), dict(data=1, fsdp=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_other_meshes_compute_it_too(sizes, exchange):
    got, _ = on_devices("softmax", sizes, exchange=exchange, shared_hidden=16)
    assert_close(got, alone("softmax", exchange=exchange, shared_hidden=16))


@pytest.mark.parametrize("router", ["expert_choice", "race"])
def test_pools_of_two_images_compute_it_too(router):
    got, _ = on_devices(router, {"data": 2, "expert": 2}, pool=2)
    assert_close(got, alone(router, pool=2))
    with pytest.raises(AssertionError):
        assert_close(alone(router, pool=2)[1], alone(router)[1])


def test_slots_move_rows_and_gather_nothing():
    _, text = on_devices("expert_choice", {"data": 1, "expert": 8}, exchange="all_to_all")
    assert "all-to-all" in text and "all-gather" not in text


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_what_finds_no_room_is_dropped_and_counted(factor):
    """Capacity counts a pool's choices in the order of tokens, on one device as on eight."""
    graph, params = layer("softmax", capacity_factor=factor)
    capacity = int(np.ceil(factor * 2 * T / E))
    (_, y, report, _), _ = on_devices(
        "softmax", {"data": 1, "expert": 8}, capacity_factor=factor, exchange="all_to_all"
    )
    assert_close(y, alone("softmax", capacity_factor=factor)[1])
    want = np.zeros((B, T, D))
    for b, logits in enumerate(images() @ jnp.asarray(params["router_kernel"][...])):
        used, dropped = np.zeros(E, int), 0
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for t in range(T):
            for e in np.argsort(-logits[t])[:2]:
                used[e] += 1
                dropped += used[e] > capacity
                if used[e] <= capacity:
                    gate, up = np.asarray(jnp.einsum("d,dgf->gf", images()[b, t], params["gate_up_kernel"][...][e]))
                    want[b, t] += p[t, e] * ((gate / (1 + np.exp(-gate)) * up) @ params["down_kernel"][...][e])
        assert report.dropped[b] == dropped
        np.testing.assert_array_equal(report.load.rows[b], used)
    assert report.dropped.sum() > 0
    np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


def losses_of_examples(graph, params, x):
    """One a pool: of its output, its balance and its logits."""
    y, report = nnx.merge(graph, params)(x, INDEX)
    auxiliary = jax.vmap(lambda load: load_balance_loss(load) + z_loss(load))(report.load)
    return jnp.sum(jnp.square(y).reshape(len(auxiliary), -1), axis=1) + auxiliary


@pytest.mark.parametrize("router", ROUTERS)
def test_an_example_alone_in_its_pool_meets_nothing_of_another(router):
    """What private training needs, to the bit; a pool of two breaks it where tokens compete."""
    graph, params = layer(router, capacity_factor=1.0)
    losses = jax.jit(functools.partial(losses_of_examples, graph, params))
    before, other = np.asarray(losses(images())), images().at[3].set(images(seed=9)[3])
    after = np.asarray(losses(other))
    np.testing.assert_array_equal(before != after, np.arange(B) == 3)
    if router in ("expert_choice", "race"):
        graph, params = layer(router, pool=2)
        neighbours = jax.jit(lambda x: nnx.merge(graph, params)(x, INDEX)[0])
        changed = np.any(np.asarray(neighbours(images()) != neighbours(other)), axis=(1, 2))
        np.testing.assert_array_equal(changed, np.isin(np.arange(B), [2, 3]))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nor_does_it_on_eight_devices(exchange):
    graph, params = layer("softmax", exchange=exchange)
    mesh = make_mesh(MeshConfig(data=1, expert=8))
    with jax.set_mesh(mesh):
        losses = jax.jit(functools.partial(losses_of_examples, graph, params))
        place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, spec("B", mesh)))
        before = np.asarray(losses(place(images())))
        after = np.asarray(losses(place(images().at[3].set(images(seed=9)[3]))))
    np.testing.assert_array_equal(before != after, np.arange(B) == 3)


def test_the_router_is_float32_in_a_network_of_bfloat16():
    """Its logits are those of float32 weights, to the last bit; the gradient to the tokens is bfloat16 again."""
    graph, params = layer("softmax")
    x = images().astype(jnp.bfloat16)
    narrow = jax.tree.map(
        lambda p: p if p.get_metadata().get("float32") else p.replace(p[...].astype(jnp.bfloat16)),
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )  # fmt: skip
    y, report = nnx.merge(graph, narrow)(x, INDEX)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router_kernel"][...], np.float64)
    want = np.sum(np.log(np.exp(logits).sum(-1)) ** 2, axis=1)
    np.testing.assert_allclose(report.load.z, want, rtol=1e-5)  # bfloat16 weights are off by 2^-9
    assert y.dtype == jnp.bfloat16
    d_x = jax.grad(lambda x: jnp.sum(nnx.merge(graph, narrow)(x, INDEX)[0].astype(jnp.float32)))(x)
    assert d_x.dtype == jnp.bfloat16


def test_the_default_exchange_moves_least_and_drops_nothing():
    name = functools.partial(default_exchange, devices=8, even=False, gpu=True)
    assert name(2) == "ragged" and name(7) == "ragged" and name(8) == "gather"
    assert default_exchange(2, 8, even=False, gpu=False) == "gather"
    assert default_exchange(2, 8, even=True, gpu=True) == "all_to_all"
    assert default_exchange(2, 2, even=True, gpu=True) == "gather"


def test_a_batch_that_is_no_multiple_of_the_pool_is_refused():
    graph, params = layer("race", pool=3)
    with pytest.raises(
        ValueError, match=r"the batch of 8 images, split over 1 device\(s\), is not a multiple of the pool of 3"
    ):
        nnx.merge(graph, params)(images())


def test_so_is_one_that_is_none_on_each_device():
    with pytest.raises(
        ValueError, match=r"the batch of 8 images, split over 8 device\(s\), is not a multiple of the pool of 2"
    ):
        on_devices("race", {"data": 2, "expert": 4}, pool=2)


def test_slots_that_nothing_bounds_are_as_many_as_tokens():
    """And not as many as choices, which are twice that: an expert has a token once at most."""
    _, text = on_devices("softmax", {"data": 1, "expert": 8}, exchange="all_to_all")
    assert f"[{E * T},{D}]" in text and f"[{2 * E * T},{D}]" not in text


def test_identical_experts_are_one_dense_mlp():
    """Where a token's weights sum to 1."""
    choose = lambda x, bias, index: top_k_softmax(x, active=3, normalize=True)
    moe = MoE(D, F, E, choose=choose, scores=softmax_scores, active=3, rngs=nnx.Rngs(0))
    for param in (moe.gate_up_kernel, moe.down_kernel):
        param.set_value(jnp.broadcast_to(param[...][:1], param.shape))
    gate, up = np.einsum("btd,dgf->gbtf", np.float64(images()), np.float64(moe.gate_up_kernel[...][0]))
    want = gate / (1 + np.exp(-gate)) * up @ np.float64(moe.down_kernel[...][0])
    np.testing.assert_allclose(moe(images())[0], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_each_expert_begins_as_one_matrix_by_itself():
    """Xavier's bound of (D, 2 F) and (F, D): the number of experts is no fan."""
    moe = MoE(D, F, E, **ROUTERS["race"], rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
    for kernel, fans in ((moe.gate_up_kernel, D + 2 * F), (moe.down_kernel, F + D)):
        np.testing.assert_allclose(jnp.abs(kernel[...]).max(), np.sqrt(6 / fans), rtol=0.02)
