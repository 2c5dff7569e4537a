"""The private step: it releases the noised sum divided by the expected batch size, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dito_jax.diffusion.loss import LossConfig
from dito_jax.privacy.keys import StepKeys
from dito_jax.privacy.step import make_private_step
from dito_jax.sharding import MeshConfig, make_mesh, shardings, spec
from dito_jax.training.health import Health
from dito_jax.training.state import TrainState
from dito_jax.training.trainable import divided, num_trained
from kernels_pallas.ffi import custom_calls

from .conftest import MODELS


pytestmark = pytest.mark.recorded


CONFIG = MODELS["modern"]
UNITS, IMAGES = 8, 2
EXPECTED, SIGMA, CLIP = 5.0, 3.0, 0.5
KEYS = StepKeys(bytes(32), "run", 0)
OPTIMIZER = optax.sgd(1.0)  # the change of the parameters is minus the published gradient


def private_step(problem, **changes):
    options = dict(
        null_label=CONFIG.num_classes, decays=(0.9,), compute_dtype="float32", gradient_accumulation_steps=1,
        clip_norm=CLIP, noise_multiplier=SIGMA, expected_batch=EXPECTED, noise_multiplicity=1, backend="bookkeeping",
        microbatch=1, internal=False,
    )  # fmt: skip
    return make_private_step(problem.graph, OPTIMIZER, LossConfig(), **options | changes)


def state_of(problem):
    params = jax.tree.map(jnp.copy, problem.params)
    ema = {"0.9": jax.tree.map(jnp.copy, params)}
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), ema, key, Health.new(4))


def batch_of(step=1, absent=(), seed=0):
    """Eight units of two images; unit 2 has one image; `absent` ones are padding."""
    rng = np.random.default_rng(seed)
    padding = np.zeros((UNITS, IMAGES), bool)
    padding[2, 1] = True
    padding[list(absent)] = True
    return {
        "image": jnp.asarray(rng.normal(size=(UNITS, IMAGES, *CONFIG.image_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(CONFIG.num_classes, size=(UNITS, IMAGES)), jnp.int32),
        "padding": jnp.asarray(padding),
        "draw_key": jnp.asarray(KEYS.key(step, "draw")),
        "noise_key": jnp.asarray(KEYS.key(step, "noise")),
    }


made = {}


def compiled(problem, **changes):
    """Each step once."""
    key = tuple(sorted(changes.items()))
    if key not in made:
        made[key] = jax.jit(private_step(problem, **changes))
    return made[key]


def published(problem, batch, **changes):
    """The gradient that a step publishes, of each parameter, and its metrics."""
    after, metrics = compiled(problem, **changes)(state_of(problem), batch)
    return jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a - b), problem.params, after.params)), metrics


def norm(leaves):
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves)))


def difference(one, other):
    return norm([a - b for a, b in zip(one, other, strict=True)])


EMPTY = tuple(range(UNITS))


@pytest.fixture(scope="module")
def modern(problem):
    return problem("modern")


@pytest.mark.parametrize("devices", [1, 8])
def test_an_empty_batch_is_noise_of_one_standard_deviation_on_every_mesh(modern, devices):
    """One draw of N(0, (sigma C)^2) over the expected batch: not one a device, not one smaller by their number."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    alone, _ = published(modern, batch_of(absent=EMPTY))
    with jax.set_mesh(mesh):
        state = jax.device_put(state_of(modern), shardings(state_of(modern), mesh))
        by_unit = jax.NamedSharding(mesh, spec("B", mesh))
        batch = {
            name: jax.device_put(value, jax.NamedSharding(mesh, jax.P()) if name.endswith("key") else by_unit)
            for name, value in batch_of(absent=EMPTY).items()
        }
        after, _ = jax.jit(private_step(modern))(state, batch)  # its own for each mesh
    found = [
        np.asarray(b) - np.asarray(a)
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(modern.params), strict=True)
    ]
    values = np.concatenate([leaf.ravel() for leaf in found])
    assert values.std() == pytest.approx(SIGMA * CLIP / EXPECTED, rel=4 / np.sqrt(2 * values.size))
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(values.size)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_noise_is_the_same_where_its_custom_call_is_not_built(modern, tmp_path, monkeypatch):
    found, _ = published(modern, batch_of(absent=EMPTY))
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    after, _ = jax.jit(private_step(modern))(state_of(modern), batch_of(absent=EMPTY))
    again = jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a - b), modern.params, after.params))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_noise_is_of_every_leaf_alone_and_of_every_step(modern):
    leaves, _ = published(modern, batch_of(absent=EMPTY))
    by_shape = {}
    for leaf in leaves:
        by_shape.setdefault(leaf.shape, []).append(leaf.ravel())
    for alike in by_shape.values():
        for one, other in zip(alike, alike[1:], strict=False):
            assert one.size < 100 or abs(np.corrcoef(one, other)[0, 1]) < 0.3
    again, _ = published(modern, batch_of(step=2, absent=EMPTY))
    values = [np.concatenate([leaf.ravel() for leaf in found]) for found in (leaves, again)]
    assert abs(np.corrcoef(*values)[0, 1]) < 0.03


QUIET = dict(noise_multiplier=1e-9, clip_norm=0.01)  # which clips every unit here


def test_the_sum_is_divided_by_the_expected_batch_and_not_by_its_size(modern):
    alone = [published(modern, batch_of(absent=set(EMPTY) - {unit}), **QUIET)[0] for unit in (1, 4)]
    assert [norm(one) for one in alone] == pytest.approx([0.01 / EXPECTED] * 2, rel=1e-3)
    both, _ = published(modern, batch_of(absent=set(EMPTY) - {1, 4}), **QUIET)
    assert difference(both, [a + b for a, b in zip(*alone, strict=True)]) < 1e-3 * norm(both)


@pytest.mark.parametrize("noise_multiplicity", [1, 3])
def test_one_unit_moves_what_is_published_by_the_clip_norm_at_most(modern, noise_multiplicity):
    """A unit is all its images and all its draws: together they have one clip norm."""
    with_it, _ = published(modern, batch_of(), noise_multiplicity=noise_multiplicity, **QUIET)
    for unit in (0, 2, 5):
        without, _ = published(modern, batch_of(absent=(unit,)), noise_multiplicity=noise_multiplicity, **QUIET)
        assert difference(with_it, without) * EXPECTED == pytest.approx(0.01, rel=1e-3)


def test_noise_draws_are_averaged_inside_the_unit(modern):
    """With room enough nothing is clipped, and more draws are a less noisy mean, not a larger sum."""
    options = dict(noise_multiplier=1e-12, clip_norm=1e6)
    few, many = (
        [
            published(modern, batch_of(step=step), noise_multiplicity=noise_multiplicity, **options)[0]
            for step in range(6)
        ]
        for noise_multiplicity in (1, 8)
    )
    spread = lambda found: norm([np.std(leaves, axis=0) for leaves in zip(*found, strict=True)])
    size = lambda found: norm([np.mean(leaves, axis=0) for leaves in zip(*found, strict=True)])
    assert spread(many) < 0.6 * spread(few)
    assert 0.5 < size(many) / size(few) < 1.5


def test_a_unit_is_the_mean_of_the_images_that_it_has(modern):
    def alone(*images):
        padding = jnp.ones((UNITS, IMAGES), bool).at[0, list(images)].set(False)
        options = dict(noise_multiplier=1e-12, clip_norm=1e6, noise_multiplicity=1)
        return published(modern, batch_of() | {"padding": padding}, **options)[0]

    both, first, second = alone(0, 1), alone(0), alone(1)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert difference(both, mean) < 1e-3 * norm(both) < 1e-2 * difference(first, second)


@pytest.mark.parametrize("backend", ["bookkeeping", "microbatch"])
def test_parts_of_a_batch_are_clipped_one_by_one_and_get_noise_once(modern, backend):
    whole, _ = published(modern, batch_of(absent=(3,)), backend=backend)
    parts, _ = published(modern, batch_of(absent=(3,)), backend=backend, gradient_accumulation_steps=4)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_unit_that_is_not_finite_is_zero_and_the_step_is_taken(modern):
    broken = batch_of()
    broken["image"] = broken["image"].at[1, 0, 0, 0, 0].set(jnp.nan)
    found, metrics = published(modern, broken)
    wanted, _ = published(modern, batch_of(absent=(1,)))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.isfinite(metrics["gradient_norm"])


def test_nothing_but_the_noised_gradient_is_told_of_the_examples(modern):
    noised, metrics = published(modern, batch_of())
    assert set(metrics) == {"gradient_norm", "bad"}
    assert metrics["gradient_norm"] == pytest.approx(norm(noised), rel=1e-4)
    _, internal = published(modern, batch_of(absent=(1, 4)), internal=True)
    extra = set(internal) - set(metrics)
    assert extra and all(name.startswith("internal_") for name in extra)
    assert internal["internal_examples"] == 6 and 0 <= internal["internal_clipped"] <= 1


def test_the_ema_is_computed_from_released_parameters(modern):
    state = state_of(modern)
    after, _ = compiled(modern)(state, batch_of())
    for average, old, new in zip(*map(jax.tree.leaves, (after.ema["0.9"], state.params, after.params)), strict=True):
        assert np.all((average - old) * (new - average) >= -1e-6)
    assert int(after.step) == 1 and jax.tree.structure(after) == jax.tree.structure(state)


def test_what_is_frozen_gets_no_noise_and_stays_to_the_bit(modern):
    names = ("lora_a", "lora_b", "table")
    trained, frozen = divided(modern.params, names)
    state = dataclasses.replace(state_of(modern), optimizer=OPTIMIZER.init(trained))
    after, metrics = jax.jit(private_step(modern, trainable=names, gradient_accumulation_steps=2))(state, batch_of())
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for found in (after.params, after.ema["0.9"]):
        moved, stayed = divided(found, names)
        for one, other in zip(*map(jax.tree.leaves, (stayed, frozen)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert all(np.all(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, trained)), strict=True))
    size = num_trained(modern.params, names)
    assert size < 0.2 * num_trained(modern.params, ())
    noise = SIGMA * CLIP / EXPECTED * np.sqrt(size)
    assert metrics["gradient_norm"] == pytest.approx(noise, rel=0.2)  # of so many numbers, and no others
