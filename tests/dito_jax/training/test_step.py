"""The train step: precision, EMA, gradient accumulation and random draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.ema import update_ema
from dito_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from dito_jax.training.program import LoopConfig, make_program
from dito_jax.training.step import draw
from dito_jax.training.trainable import divided, num_trained


pytestmark = pytest.mark.recorded


MODEL = DiTConfig((4, 4, 1), num_classes=3, patch=2, depth=1, width=32, num_heads=2)
BATCH = {
    "image": jax.random.normal(jax.random.key(0), (8, 4, 4, 1)),
    "label": jnp.arange(8, dtype=jnp.int32) % 3,
}


def program(learning_rate=2e-4, **loop):
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    settings = dict(steps=10, batch_size=8, compute_dtype="float32", ema_decays=(0.9, 0.99)) | loop
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=0)
    return make_program(MODEL, LossConfig(), optimizer, LoopConfig(**settings), mesh)


def test_everything_kept_is_float32_when_the_network_computes_in_bfloat16():
    made = program(compute_dtype="bfloat16")
    state, metrics = made.step(made.init(), BATCH)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    jaxpr = str(made.step.trace(made.state, made.batch).jaxpr)
    assert "bf16[8,4,32]" in jaxpr and "bf16[8,4,32]" not in str(program().step.trace(made.state, made.batch).jaxpr)
    assert jnp.isfinite(metrics["loss"])


def test_a_step_is_a_function_of_state_and_batch_and_each_step_draws_anew():
    made = program()
    state = lambda: made.init()
    first, again = made.step(state(), BATCH), made.step(state(), BATCH)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    # Without learning, the loss of a step differs from the next only by what is drawn.
    frozen = program(learning_rate=0.0)
    one, metrics_one = frozen.step(frozen.init(), BATCH)
    _, metrics_two = frozen.step(one, BATCH)
    assert metrics_one["loss"] != metrics_two["loss"]


def test_times_noise_and_dropped_classes_know_nothing_of_each_other():
    batch = {"image": jnp.zeros((4096, 1, 1, 1)), "label": jnp.zeros(4096, jnp.int32)}
    drawn = draw(jax.random.key(0), batch, LossConfig(class_dropout_prob=0.5), null_label=3)
    columns = [drawn["t"], drawn["noise"].ravel(), drawn["label"] == 3]
    np.testing.assert_allclose(np.corrcoef(np.stack(columns).astype(float)), np.eye(3), atol=0.07)


def test_the_seed_decides_the_parameters():
    kernels = [program(seed=seed).init().params["patches"]["kernel"][...] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])


def test_averages_follow_at_their_own_pace():
    params = {"w": jnp.ones(3)}
    averages = {"0.5": {"w": jnp.zeros(3)}, "0.999": {"w": jnp.zeros(3)}}
    late = update_ema(averages, params, (0.5, 0.999), jnp.array(1_000_000))
    np.testing.assert_allclose(late["0.5"]["w"], 0.5)
    np.testing.assert_allclose(late["0.999"]["w"], 0.001, rtol=1e-4)
    early = update_ema(averages, params, (0.5, 0.999), jnp.array(0))
    np.testing.assert_allclose(early["0.999"]["w"], 0.9, rtol=1e-6)


def test_the_learning_rate_warms_up_peaks_and_ends_where_it_should():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), steps=100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6)
    constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_fraction=1.0), steps=100)
    np.testing.assert_allclose([constant(0), constant(50)], 1)


def test_only_kernels_decay():
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "table": jnp.ones((2, 2))}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0)
    np.testing.assert_array_equal(updates["table"], 0)


def test_the_size_of_a_large_gradient_does_not_matter():
    """Clipped to norm 1, then divided by its own second moment's root: but for clipping, Adam would see a spike."""
    params = {"w": jnp.zeros(4)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=1.0), steps=10)

    def after_a_spike_of(size):
        state, updates = optimizer.init(params), None
        for gradient in (0.1, size, 0.1):
            updates, state = optimizer.update({"w": jnp.full(4, gradient)}, state, params)
        return updates["w"]

    np.testing.assert_allclose(after_a_spike_of(10.0), after_a_spike_of(1e6), rtol=1e-5)
    assert not np.allclose(after_a_spike_of(10.0), after_a_spike_of(0.1))


def test_the_real_parameters_have_kernels_that_decay():
    state = program().init()
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, weight_decay=0.5), steps=10)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(zero, optimizer.init(state.params), state.params)
    assert np.abs(updates["patches"]["kernel"][...]).max() > 0
    assert np.abs(updates["label"]["table"][...]).max() == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up_to_the_batch(parts):
    whole, cut = program(), program(gradient_accumulation_steps=parts)
    _, metrics = whole.step(whole.init(), BATCH)
    _, metrics_cut = cut.step(cut.init(), BATCH)
    for name in metrics:
        np.testing.assert_allclose(metrics_cut[name], metrics[name], rtol=1e-5)


def test_what_is_frozen_stays_to_the_bit_and_has_no_moments():
    names = ("out", "label")
    made = program(trainable=names, learning_rate=1e-2, gradient_accumulation_steps=2)
    before = jax.device_get(made.init())
    after, _ = made.step(made.init(), BATCH)
    for found in (after.params, after.ema["0.9"]):
        moved, stayed = divided(found, names)
        for one, other in zip(*map(jax.tree.leaves, (stayed, divided(before.params, names)[1])), strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.any(moved["out"]["kernel"][...] != before.params["out"]["kernel"][...])
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim)
    assert moments == 2 * num_trained(before.params, names) < num_trained(before.params, ())


def test_a_name_of_no_parameter_is_one_line():
    with pytest.raises(
        UserError, match="no parameter of this model has 'atention' in its path; did you mean 'attention'?"
    ):
        program(trainable=("label", "atention"))
