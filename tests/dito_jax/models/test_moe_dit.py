"""MoE-DiT: published sizes, routers, auxiliary losses, upcycling, and independent examples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.config import TrainConfig, check, from_json, to_json
from dito_jax.data import DigitsData
from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig, Report
from dito_jax.models.moe_dit import MoEBlock, MoEDiTConfig
from dito_jax.models.upcycling import check_upcycling, upcycled
from dito_jax.overrides import override
from dito_jax.sharding import MeshConfig, make_mesh, spec
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig, make_program
from dito_jax.training.step import cast


pytestmark = pytest.mark.recorded


TINY = MoEDiTConfig(
    (8, 8, 1), num_classes=3, patch=2, depth=2, width=32, num_heads=2, num_experts=4, active_experts=2,
    expert_hidden=24, shared_hidden=16,
)  # fmt: skip
ROUTERS = ["softmax", "sigmoid", "expert_choice", "race", "timestep"]


@functools.cache
def network(config: MoEDiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Random parameters of unit gain, so that nothing hides behind zeros."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)
    scale = lambda leaf: np.float32(max(leaf.shape[-2:-1], default=1) ** -0.5)
    draw = lambda leaf: scale(leaf) * rng.standard_normal(leaf.shape, np.float32)
    return graph, jax.tree.map(draw, shapes)


def inputs(batch=4, seed=1):
    image = jax.random.normal(jax.random.key(seed), (batch, *TINY.image_shape))
    return image, jnp.linspace(0.05, 0.95, batch), jnp.arange(batch, dtype=jnp.int32) % 3


def said(config, *arrays):
    graph, params = network(config)
    return jax.jit(lambda params, *arrays: nnx.merge(graph, params).with_report(*arrays))(params, *arrays)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("DiT-MoE-XL/2-8E2A", 4.1, 1.5),
        ("DiT-MoE-G/2-16E2A", 16.5, 3.1),
        ("DSMoE-3B/2-E16", 3.0, 0.965),
        ("DSMoE-L/2-E48", None, 0.436),
    ],
)
def test_sizes_are_those_published(name, billions, active):
    """To 5 %: published figures are rounded, and leave open what the dense MLPs and the embeddings have."""
    config = MoEDiTConfig.preset(name, (32, 32, 4), 1000, mlp="gelu", norm="layer", qk_norm=False, positions="sincos")
    assert billions is None or config.num_parameters() / 1e9 == pytest.approx(billions, rel=0.05)
    assert config.active_parameters() / 1e9 == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize("change", [{}, dict(moe_every=2), dict(router="timestep", shared_hidden=0)], ids=str)
def test_flops_are_those_of_a_dense_model_with_as_wide_mlps(change):
    """A dense block's three products, as many columns wide as a token meets, and the router."""
    config = dataclasses.replace(TINY, **change)
    dense = DiTConfig(**{f.name: getattr(TINY, f.name) for f in dataclasses.fields(DiTConfig)})
    tokens, layers = 16, 2 // config.moe_every
    columns = (24 if config.router == "timestep" else 2 * 24) + config.shared_hidden
    router = 2 * 32 * 4
    want = tokens * layers * (3 * 2 * 32 * columns + router - dense.mlp_flops() // 2)
    assert config.flops() - dense.flops() == want


def test_blocks_start_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 16, 32))
    block = jax.jit(lambda x: MoEBlock(TINY, rngs=nnx.Rngs(0)).run(x, x[:, 0], None, None)[0])
    np.testing.assert_array_equal(block(x), x)


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_reports_what_it_computed(router):
    config = dataclasses.replace(TINY, router=router, capacity_factor=1.0 if router == "softmax" else None)
    image, report = said(config, *inputs())
    assert image.shape == (4, 8, 8, 1) and np.isfinite(image).all()
    tokens = 4 * 16
    np.testing.assert_array_equal(report.rows.sum(axis=1), tokens * (1 if router == "timestep" else 2))
    if router == "expert_choice":
        np.testing.assert_array_equal(report.rows, tokens * 2 / 4)
    if router == "timestep":  # times 0.05, 0.35, 0.65, 0.95: one quarter each
        np.testing.assert_array_equal(report.rows, 16)
        _, early = said(config, inputs()[0], jnp.full(4, 0.3), inputs()[2])
        np.testing.assert_array_equal(early.rows, [[0, 64, 0, 0]] * 2)
    share = report.rows / report.rows.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(report.metrics["expert_load_max"], 4 * share.max(), rtol=1e-6)
    assert (report.metrics["dropped"] > 0) == (router == "softmax")


def test_dense_blocks_and_blocks_with_experts_take_turns():
    graph, params = network(dataclasses.replace(TINY, depth=4, moe_every=2))
    blocks = nnx.to_pure_dict(params)["blocks"]
    assert blocks["dense"]["mlp"]["gate_up"]["kernel"].shape[:1] == (2,)
    assert blocks["moe"]["mlp"]["gate_up_kernel"].shape == (2, 4, 32, 2, 24)
    _, report = said(dataclasses.replace(TINY, depth=4, moe_every=2), *inputs())
    assert report.rows.shape == (2, 4)


def test_the_auxiliary_losses_move_the_router():
    """With a network that ignores its router's weights, for it sends all tokens to all experts alike."""
    config = dataclasses.replace(TINY, balance_weight=1.0, z_weight=1.0)
    graph, params = network(config)
    loss = lambda params: jnp.mean(nnx.merge(graph, params).with_report(*inputs())[1].losses)
    gradient = jax.jit(jax.grad(loss))(params)
    router = gradient["blocks"]["moe"]["mlp"]["router_kernel"][...]
    assert np.abs(router).min(axis=(1, 2)).max() > 0
    without = dataclasses.replace(TINY, balance_weight=0.0)
    np.testing.assert_array_equal(said(without, *inputs())[1].losses, 0)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_loss_of_an_example_depends_on_that_example_alone(router):
    """To the bit, image and auxiliary loss; balanced over the batch, it does not."""
    private = dataclasses.replace(TINY, router=router, balance="example", z_weight=0.1)

    def losses(config, arrays):
        image, report = said(config, *arrays)
        return np.asarray(jnp.mean(jnp.square(image), axis=(1, 2, 3))), np.asarray(report.losses)

    image, t, label = inputs()
    other = image.at[2].set(inputs(seed=7)[0][2]), t, label
    for before, after in zip(losses(private, inputs()), losses(private, other), strict=True):
        unchanged = before == after
        assert unchanged[[0, 1, 3]].all()
    assert losses(private, inputs())[0][2] != losses(private, other)[0][2]
    if router != "timestep":
        shared = dataclasses.replace(private, balance="batch")
        assert losses(shared, inputs())[1][0] != losses(shared, other)[1][0]


def test_router_and_bias_stay_float32_in_bfloat16():
    _, params = network(dataclasses.replace(TINY, router="sigmoid"))
    moe = cast(params, "bfloat16")["blocks"]["moe"]["mlp"]
    kept = {name: moe[name][...].dtype.name for name in ("router_kernel", "bias", "gate_up_kernel", "down_kernel")}
    assert list(kept.values()) == ["float32", "float32", "bfloat16", "bfloat16"]


# In training.


@functools.cache
def steps(config: MoEDiTConfig, count=3, sizes=None, **loop):
    """(losses, metrics of the last, final parameters) of the first steps on digits, in float32 unless said."""
    settings = dict(steps=count, batch_size=16, compute_dtype="float32", ema_decays=(0.9,)) | loop
    mesh = make_mesh(MeshConfig(**dict(sizes or ())), np.array(jax.devices()[: 8 if sizes else 1]))
    data = DigitsData().open("train")
    with jax.set_mesh(mesh):
        program = make_program(
            config, LossConfig(), OptimizerConfig(learning_rate=1e-3, warmup_steps=1, weight_decay=0.1),
            LoopConfig(**settings), mesh,
        )  # fmt: skip
        state, losses, metrics = program.init(), [], {}
        for i in range(count):
            examples = [data[(16 * i + j) * 7 % len(data)] for j in range(16)]
            batch = {name: np.stack([e[name] for e in examples]) for name in ("image", "label")}
            state, metrics = program.step(
                state, jax.device_put(batch, jax.tree.map(lambda a: a.sharding, program.batch))
            )
            losses.append(float(metrics["loss"]))
    return losses, {name: float(value) for name, value in metrics.items()}, state.params


DIGITS = dataclasses.replace(TINY, num_classes=10)


def test_the_loss_of_a_step_has_the_auxiliary_losses_in_it():
    config = dataclasses.replace(DIGITS, balance_weight=0.0)
    [plain], metrics, _ = steps(config, 1)
    [weighed], _, _ = steps(dataclasses.replace(config, balance_weight=2.0), 1)
    np.testing.assert_allclose(weighed - plain, 2.0 * metrics["balance_loss"], rtol=1e-5)


def test_a_biased_router_is_moved_by_the_load_and_by_nothing_else():
    """Each step moves each bias by the rate, or not at all: neither gradient, nor decay of weights."""
    config = dataclasses.replace(DIGITS, router="sigmoid", bias_rate=0.125, balance_weight=0.0)
    bias = np.asarray(steps(config)[2]["blocks"]["moe"]["mlp"]["bias"][...])
    assert bias.shape == (2, 4) and (bias != 0).any() and np.abs(bias).max() <= 3 * 0.125
    np.testing.assert_array_equal(bias / 0.125, np.round(bias / 0.125))


def test_biases_fall_for_experts_with_too_much_and_rise_for_those_with_too_little():
    config = dataclasses.replace(TINY, router="sigmoid", bias_rate=0.125)
    params = network(config)[1]
    moved = config.rebalance(params, Report(rows=jnp.array([[9.0, 3, 4, 0], [4, 4, 4, 4]])))
    difference = jax.tree.map(lambda after, before: np.asarray(after - before), moved, params)
    bias = difference["blocks"]["moe"]["mlp"].pop("bias")[...]
    np.testing.assert_allclose(bias, [[-0.125, 0.125, 0, 0.125], [0, 0, 0, 0]], atol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(difference))


@pytest.mark.parametrize("change", [dict(remat=True), dict(gradient_accumulation_steps=4)], ids=str)
def test_neither_remat_nor_accumulation_changes_what_is_counted(change):
    """Counts are a step's output: a second forward pass does not double them, and parts add up."""
    config = dataclasses.replace(DIGITS, router="sigmoid", bias_rate=0.125, balance_weight=0.0)
    model = dataclasses.replace(config, remat=change.get("remat", False))
    losses, _, params = steps(model, gradient_accumulation_steps=change.get("gradient_accumulation_steps", 1))
    want_losses, _, want = steps(config)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    biases = lambda params: np.asarray(params["blocks"]["moe"]["mlp"]["bias"][...])
    np.testing.assert_array_equal(biases(params), biases(want))


@pytest.mark.slow("compiles a train step for eight devices and one for one")
@pytest.mark.parametrize(
    ("exchange", "sizes"),
    [
        ("all_to_all", (("data", 2), ("expert", 4))),
        ("gather", (("data", 1), ("fsdp", 2), ("expert", 2), ("tensor", 2))),
    ],
)
def test_eight_devices_train_to_the_losses_of_one(exchange, sizes):
    config = dataclasses.replace(DIGITS, capacity_factor=1.5)
    want, want_metrics, _ = steps(config)
    got, metrics, params = steps(dataclasses.replace(config, exchange=exchange), sizes=sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name in ("balance_loss", "expert_load_max", "dropped"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5)
    moe = params["blocks"]["moe"]["mlp"]
    for name, dims in (("gate_up_kernel", "L E D . F"), ("down_kernel", "L E F D")):
        kernel = moe[name][...]
        assert kernel.sharding.spec == spec(dims, kernel.sharding.mesh), "experts stay on their devices"


# As a user meets it.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(active_experts=5), "active_experts 5 is not between 1 and num_experts 4"),
        (dict(depth=3, moe_every=2), "depth 3 is not a multiple of moe_every 2"),
        (dict(router="sigmoid", router_groups=3), "num_experts 4 is not a multiple of router_groups 3"),
        (dict(router="sigmoid", router_groups=4), "the 1 active_groups have fewer than active_experts 2"),
        (dict(pool=2, balance="example"), "balance 'example' needs a pool of 1"),
        (dict(capacity_factor=0.0), "capacity_factor 0.0 is not positive"),
    ],
)
def test_impossible_configs_say_why(change, words):
    assert any(words in problem for problem in dataclasses.replace(TINY, **change).problems())
    assert not TINY.problems()


def config_of(**changes) -> TrainConfig:
    return TrainConfig(dataclasses.replace(DIGITS, **changes), DigitsData(), LoopConfig(steps=10, batch_size=16))


@pytest.mark.parametrize(
    ("config", "mesh", "words"),
    [
        (config_of(num_experts=6), MeshConfig(expert=4), "model.num_experts 6 is not a multiple of mesh.expert 4"),
        (config_of(pool=4), MeshConfig(), "the 2 images .* at once are not a multiple of model.pool 4"),
        (config_of(expert_hidden=25), MeshConfig(tensor=2), "the experts' width 25 is not a multiple of mesh.tensor 2"),
        (
            config_of(shared_hidden=17),
            MeshConfig(tensor=2),
            "model.shared_hidden 17 is not a multiple of mesh",
        ),
    ],
)
def test_impossible_meshes_are_refused_in_one_line(config, mesh, words):
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(config, mesh=mesh), 8)


def test_a_config_goes_through_the_command_line_and_json():
    changed = override(config_of(), ["--model.num_experts", "6", "--model.router", "race", "--mesh.expert=2"])
    model = changed.model
    assert isinstance(model, MoEDiTConfig) and (model.num_experts, model.router, changed.mesh.expert) == (6, "race", 2)
    assert from_json(to_json(changed)) == changed


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="choose from DiT-MoE-S/2-8E2A"):
        MoEDiTConfig.preset("DiT-MoE-XXL", (32, 32, 4), 1000)


# Out of a dense model.


DENSE = DiTConfig((8, 8, 1), num_classes=3, patch=2, depth=2, width=32, num_heads=2)


@pytest.mark.parametrize("moe_every", [1, 2])
@pytest.mark.parametrize("make", [dict(normalize=True), dict(router="sigmoid")], ids=str)
def test_an_upcycled_model_computes_what_the_dense_one_does(make, moe_every):
    model = MoEDiTConfig(**vars(DENSE), num_experts=4, moe_every=moe_every, **make)
    check_upcycling(DENSE, model)
    graph_dense, dense = network(DENSE)  # pyright: ignore[reportArgumentType]
    graph, fresh = network(model)
    params = upcycled(dense, fresh, model)
    run = lambda graph, params: np.asarray(jax.jit(lambda p: nnx.merge(graph, p)(*inputs()))(params))
    want = run(graph_dense, dense)
    np.testing.assert_allclose(run(graph, params), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not np.allclose(run(graph, fresh), want, atol=0.1)


@pytest.mark.parametrize(
    ("dense", "model", "words"),
    [
        ({}, dict(expert_hidden=24), "model.expert_hidden is 24, the dense model's MLPs have 96"),
        ({}, dict(shared_hidden=16), "model.shared_hidden is 16"),
        (dict(mlp="gelu"), {}, "the dense model's MLPs are not swiglu"),
        (dict(depth=4), {}, "the dense model differs from this one: depth 4 != 2"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_in_one_line(dense, model, words):
    with pytest.raises(UserError, match=words):
        check_upcycling(dataclasses.replace(DENSE, **dense), MoEDiTConfig(**vars(DENSE), num_experts=4, **model))
