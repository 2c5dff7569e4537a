"""DiT: the paper's parameter counts, an independent forward pass, and the initialization."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.models.dit import MODERN, ORIGINAL, DiT, DiTBlock, DiTConfig
from dito_jax.models.kernels import KernelsConfig
from kernels_pallas import backend


pytestmark = pytest.mark.recorded


TINY = DiTConfig((8, 12, 2), num_classes=3, patch=2, depth=2, width=64, num_heads=4)


def random_params(config: DiTConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """Unit-gain random parameters, so that nothing hides behind zeros."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) / np.sqrt(max(leaf.shape[-2:-1], default=1))
    return graph, jax.tree.map(draw, shapes)


def forward(graph: nnx.GraphDef, params: nnx.State, *arrays) -> jax.Array:
    return jax.jit(lambda params, *arrays: nnx.merge(graph, params)(*arrays))(params, *arrays)


def inputs(config: DiTConfig, batch: int = 3):
    image = jax.random.normal(jax.random.key(1), (batch, *config.image_shape))
    t = jnp.linspace(0.1, 0.9, batch)
    return image, t, jnp.arange(batch, dtype=jnp.int32) % (config.num_classes + 1)


def test_xl2_has_the_papers_parameter_count():
    config = DiTConfig.preset("XL/2", (32, 32, 4), 1000, **ORIGINAL, learn_sigma=True)
    assert config.num_parameters() == 675_129_632


@pytest.mark.parametrize(
    ("name", "millions", "giga_multiply_adds"),
    [("S/2", 33, 6.06), ("B/4", 130, 5.56), ("L/2", 458, 80.71), ("XL/2", 675, 118.64), ("XL/8", 676, 7.39)],
)
def test_sizes_and_flops_are_those_of_table_one(name, millions, giga_multiply_adds):
    config = DiTConfig.preset(name, (32, 32, 4), 1000, **ORIGINAL, learn_sigma=True)
    assert config.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)
    assert config.flops() / 2e9 == pytest.approx(giga_multiply_adds, rel=0.005)


@pytest.mark.parametrize("make", [ORIGINAL, MODERN], ids=["original", "modern"])
@pytest.mark.parametrize("name", ["B/4", "XL/2"])
def test_flops_agree_with_xla(name, make):
    """XLA counts a loop body once: so the whole with one block, then one block alone for each further one."""
    config = DiTConfig.preset(name, (32, 32, 4), 1000, **make)
    one = dataclasses.replace(config, depth=1)

    def xla_flops(function, *arguments):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]

    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(one, rngs=nnx.Rngs(0))), nnx.Param)
    whole = xla_flops(lambda p, *a: nnx.merge(graph, p)(*a), params, *inputs(one, batch=1))
    graph_block, block = nnx.split(nnx.eval_shape(lambda: DiTBlock(config, rngs=nnx.Rngs(0))), nnx.Param)
    tokens = jnp.zeros((1, config.grid[0] * config.grid[1], config.width))
    each = xla_flops(lambda p, x, c: nnx.merge(graph_block, p)(x, c, None), block, tokens, tokens[:, 0])
    assert config.flops() == pytest.approx(whole + (config.depth - 1) * each, rel=0.02)


@pytest.mark.parametrize("make", [ORIGINAL, MODERN], ids=["original", "modern"])
def test_blocks_start_as_the_identity_and_the_output_at_zero(make):
    config = dataclasses.replace(TINY, **make)
    out = jax.jit(lambda *arrays: DiT(config, rngs=nnx.Rngs(0))(*arrays))(*inputs(config))
    np.testing.assert_array_equal(out, 0)
    x = jax.random.normal(jax.random.key(0), (2, 24, 64))
    block = jax.jit(lambda x: DiTBlock(config, rngs=nnx.Rngs(0))(x, x[:, 0], None))
    np.testing.assert_array_equal(block(x), x)
    assert not np.allclose(forward(*random_params(config), *inputs(config)), 0)


def test_learn_sigma_doubles_the_channels():
    config = dataclasses.replace(TINY, learn_sigma=True)
    assert forward(*random_params(config), *inputs(TINY)).shape == (3, 8, 12, 4)


def test_remat_changes_no_bit_of_the_loss_and_little_of_the_gradient():
    def loss_and_gradient(remat):
        graph, params = random_params(dataclasses.replace(TINY, remat=remat))
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(*inputs(TINY)) ** 2)))(params)

    (loss, gradient), (again, gradient_again) = loss_and_gradient(False), loss_and_gradient(True)
    assert loss == again
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_grouped_queries_equal_repeated_keys_and_values():
    """With two key/value heads for four query heads, each group's key and value may as well be held twice."""
    grouped = dataclasses.replace(TINY, num_kv_heads=2, qk_norm=False)
    graph, state = random_params(grouped)
    params = nnx.to_pure_dict(state)

    def repeat(leaf):  # (..., K = 2, q q k v, H) -> (..., N = 4, q k v, H)
        heads = [leaf[..., k, jnp.array([g, 2, 3]), :] for k in range(2) for g in range(2)]
        return jnp.stack(heads, axis=-3)

    qkv = params["blocks"]["attention"]["qkv"]
    qkv |= {name: repeat(leaf) for name, leaf in qkv.items()}
    graph_whole, state_whole = random_params(dataclasses.replace(grouped, num_kv_heads=4))
    nnx.replace_by_pure_dict(state_whole, params)
    got, want = forward(graph, state, *inputs(grouped)), forward(graph_whole, state_whole, *inputs(grouped))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [ORIGINAL, MODERN], ids=["original", "modern"])
def test_agrees_with_a_plain_numpy_forward(make):
    """Written from the papers alone, float64: the definition that the layers have to meet."""
    config = dataclasses.replace(TINY, **make)
    graph, params = random_params(config)
    got = forward(graph, params, *inputs(config))
    want = numpy_dit(nnx.to_pure_dict(params), config, *inputs(config))
    # The time's phase, up to 900 radians, is good to 900 * 2^-24 = 5e-5 in float32; two blocks carry it on.
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def numpy_dit(params, config, image, t, label):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    image, t, label = np.asarray(image, np.float64), np.asarray(t, np.float64), np.asarray(label)

    def dense(x, w, inputs=1):
        return np.tensordot(x, w["kernel"], axes=inputs) + w.get("bias", 0)

    def rms(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def norm(x, scale, shift):
        x = rms(x - x.mean(-1, keepdims=True)) if config.norm == "layer" else rms(x)
        return x * (1 + scale[:, None]) + shift[:, None]

    def turned(x):  # half of a head's pairs, (x_i, x_{i + H/2}), by the row and half by the column
        each = x.shape[-1] // 4
        at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)  # (T, 2)
        angles = (at[:, :, None] * 1e4 ** (-np.arange(each) / each)).reshape(1, -1, 1, 2 * each)
        pairs = (x[..., : 2 * each] + 1j * x[..., 2 * each :]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def mlp(x, w):
        if config.mlp == "swiglu":
            gate, up = np.moveaxis(dense(x, w["gate_up"]), 2, 0)
            return dense(silu(gate) * up, w["down"])
        x = dense(x, w["up"])
        return dense(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), w["down"])

    def silu(x):
        return x / (1 + np.exp(-x))

    rows, columns = config.grid
    side = config.patch
    patches = np.stack(
        [
            image[:, r * side : (r + 1) * side, c * side : (c + 1) * side].reshape(len(image), -1)
            for r in range(rows)
            for c in range(columns)
        ],
        axis=1,
    )
    quarter = config.width // 4
    omega = 1e4 ** (-np.arange(quarter) / quarter)
    table = [
        np.concatenate([np.sin(c * omega), np.cos(c * omega), np.sin(r * omega), np.cos(r * omega)])
        for r in range(rows)
        for c in range(columns)
    ]
    x = dense(patches, p["patches"]) + (np.stack(table)[None] if config.positions == "sincos" else 0)
    angles = 1000 * t[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    c = silu(dense(silu(dense(features, p["time"]["up"])), p["time"]["out"]) + p["label"]["table"][label])

    for layer in range(config.depth):
        b = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        shift1, scale1, gate1, shift2, scale2, gate2 = np.moveaxis(dense(c, b["modulation"]), 1, 0)
        q, k, v = np.moveaxis(dense(norm(x, scale1, shift1), b["attention"]["qkv"]), 3, 0)  # (B, T, N, H) each
        if config.qk_norm:
            q, k = rms(q) * b["attention"]["q_norm"], rms(k) * b["attention"]["k_norm"]
        if config.positions == "rope":
            q, k = turned(q), turned(k)
        logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + gate1[:, None] * dense(np.einsum("bnts,bsnh->btnh", weights, v), b["attention"]["out"], inputs=2)
        x = x + gate2[:, None] * mlp(norm(x, scale2, shift2), b["mlp"])

    shift, scale = np.moveaxis(dense(c, p["modulation"]), 1, 0)
    out = dense(norm(x, scale, shift), p["out"])
    result = np.zeros((*image.shape[:3], config.out_channels))
    for number in range(rows * columns):
        r, k = divmod(number, columns)
        patch = out[:, number].reshape(len(image), side, side, -1)
        result[:, r * side : (r + 1) * side, k * side : (k + 1) * side] = patch
    return result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": 5}, "patch 5 does not divide"),
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"width": 72, "num_heads": 6}, "head width 12"),
        ({"depth": 0}, "depth 0"),
        (
            {"kernels": KernelsConfig(norm="cuda")},
            "kernels.norm 'cuda' is not an implementation; choose from xla, triton",
        ),
        ({"kernels": KernelsConfig(qk_norm_rope="mosaic_gpu")}, "qk_norm_rope 'mosaic_gpu' is not an implementation"),
        ({"kernels": KernelsConfig(attention="cuda")}, "kernels.attention 'cuda' is not an implementation"),
        ({"kernels": KernelsConfig(norm="triton"), "forward_mode": True}, "forward_mode supports only xla norms"),
    ],
)
def test_impossible_configs_say_why(change, words):
    assert any(words in problem for problem in dataclasses.replace(TINY, **change).problems())
    assert not TINY.problems()


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="sizes are S, B, L, XL"):
        DiTConfig.preset("XXL/2", (32, 32, 4), 1000)


@functools.cache
def plain_value_and_gradients(config: DiTConfig) -> list[jax.Array]:
    return value_and_gradients(config)


def value_and_gradients(config: DiTConfig) -> list[jax.Array]:
    """The network's image, and the gradients of a loss of it."""
    graph, params = random_params(config)
    weights = jax.random.normal(jax.random.key(2), (3, *config.image_shape))

    def loss(params):
        image = nnx.merge(graph, params)(*inputs(config))
        return jnp.sum(weights * image), image

    gradients, image = jax.jit(jax.grad(loss, has_aux=True))(params)
    return [image, *jax.tree.leaves(gradients)]


ILL_CONDITIONED = "attention without QK-norm amplifies rounding, which differs in code that is not optimized"


@pytest.mark.parametrize("part", ["norm", "qk_norm_rope", "attention", "mlp"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(ORIGINAL, id="original", marks=pytest.mark.optimized(ILL_CONDITIONED)),
        pytest.param(MODERN, id="modern"),
    ],
)
def test_a_kernel_by_name_changes_neither_the_image_nor_a_gradient(part, make):
    plain = KernelsConfig(attention="xla", norm="xla", qk_norm_rope="xla", mlp=None)
    config = dataclasses.replace(TINY, **make, num_kv_heads=2, kernels=plain)
    want = plain_value_and_gradients(config)
    with backend.interpret_mode():
        config = dataclasses.replace(config, kernels=dataclasses.replace(plain, **{part: "triton"}))
        lowered = str(jax.make_jaxpr(lambda: value_and_gradients(config))())
        got = value_and_gradients(config)
    mlp = {"swiglu": "gated_mlp", "gelu": "dense_mlp"}[config.mlp]
    kernels = {"norm": {"modulated_norm", "gated_residual_norm"}, "qk_norm_rope": {"qk_norm_rope"},
               "attention": {"flash_attention"}, "mlp": {mlp}}  # fmt: skip
    for pass_ in ("forward", "backward"):
        assert {name for name in set().union(*kernels.values()) if f"{name}_{pass_}" in lowered} == kernels[part]
    for mine, theirs in zip(got, want, strict=True):
        # Rounding alone: parameters of the original network that move by 2^-24 move its gradients by 9e-5 to 9e-4.
        assert np.linalg.norm(mine - theirs) <= (2e-4 if make is ORIGINAL else 1e-4) * np.linalg.norm(theirs)


def mean_flow_gradient(config: DiTConfig, graph, params):
    """MeanFlow's use of a network: its value and its derivative along the path, and a gradient through the value."""
    image, t, label = inputs(config)

    def loss(params):
        network = lambda image, t: nnx.merge(graph, params)(image, t, label)
        u, d_u = jax.jvp(network, (image, t), (jnp.ones_like(image), jnp.ones_like(t)))
        return jnp.mean((u - jax.lax.stop_gradient(u - 0.3 * d_u)) ** 2) + jnp.mean(u**2)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_forward_mode_is_the_derivative_of_the_same_network(remat):
    """Compared on a CPU, where the plain network can be differentiated forward too."""
    plain = dataclasses.replace(TINY, remat=remat)
    graph, params = random_params(plain)
    config = dataclasses.replace(plain, forward_mode=True)
    value, gradient = jax.jit(lambda p: mean_flow_gradient(config, random_params(config)[0], p))(params)
    want_value, want = jax.jit(lambda p: mean_flow_gradient(plain, graph, p))(params)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_forward_mode_lowers_for_a_gpu_with_the_tangents_kernel():
    config = dataclasses.replace(TINY, forward_mode=True, remat=True)
    graph, params = random_params(config)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(lambda p: mean_flow_gradient(config, graph, p)).trace(params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "tangent_forward", "backward_dq", "backward_dkv"):
        assert f"flash_attention_{kernel}" in text
