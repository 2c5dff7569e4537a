"""Warm start: a model from trained parameters computes the same function, or is refused in one line."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.fine_tuning import changes, check_start, check_trained, started
from dito_jax.models.moe_dit import MoEDiTConfig


pytestmark = pytest.mark.recorded


DENSE = DiTConfig((4, 4, 1), num_classes=3, patch=2, depth=2, width=32, num_heads=4, num_kv_heads=2)
EXPERTS = MoEDiTConfig(**vars(DENSE), num_experts=4)


def network(config, seed):
    graph, params = nnx.split(config.build(nnx.Rngs(seed)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return graph, jax.tree.unflatten(tree, moved)


def computed(graph, params):
    image = jax.random.normal(jax.random.key(5), (3, 4, 4, 1))
    t, label = jax.numpy.array([0.1, 0.5, 0.9]), jax.numpy.array([0, 2, 3])
    return np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(image, t, label))(params))


@pytest.mark.parametrize("old", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_with_adapters_it_begins_as_it_was_and_they_can_move_it(old):
    model = dataclasses.replace(old, adapter_rank=2)
    check_start(old, model)
    (graph_old, trained), (graph, fresh) = network(old, 0), nnx.split(model.build(nnx.Rngs(1)), nnx.Param)
    params = started(old, trained, model, fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    want = computed(graph_old, trained)
    np.testing.assert_array_equal(computed(graph, params), want)
    changed = jax.tree_util.tree_map_with_path(
        lambda path, a: a + 0.1 if any(getattr(key, "key", "") == "lora_b" for key in path) else a, params
    )
    assert np.abs(computed(graph, changed) - want).max() > 1e-3
    again = started(model, changed, model, fresh)  # a run with adapters goes on with them
    np.testing.assert_array_equal(computed(graph, again), computed(graph, changed))


@pytest.mark.parametrize(
    ("old", "model", "words"),
    [
        (DENSE, dataclasses.replace(DENSE, depth=3, norm="layer"), "depth 2 != 3, norm rms != layer"),
        (EXPERTS, DENSE, "has experts, and this model has none"),
        (EXPERTS, dataclasses.replace(EXPERTS, num_experts=2), "num_experts 4 != 2"),
        (dataclasses.replace(DENSE, adapter_rank=2), DENSE, "adapters of rank 2: set model.adapter_rank"),
        (DENSE, dataclasses.replace(EXPERTS, shared_hidden=8), "upcycling: model.shared_hidden is 8"),
        (DENSE, dataclasses.replace(DENSE, image_shape=(4, 4, 3)), "of that run have 1 channels, those of this one 3"),
    ],
)
def test_what_cannot_begin_so_is_refused_in_one_line(old, model, words):
    with pytest.raises(UserError, match=words):
        check_start(old, model)


def test_what_is_no_matter_of_the_parameters_may_differ():
    check_start(EXPERTS, dataclasses.replace(EXPERTS, remat=True, balance="example", bias_rate=0.0))


@pytest.mark.parametrize("kind", ["dense", "experts", "upcycled"])
def test_other_classes_have_a_new_embedding_and_everything_else_is_taken(kind):
    old = EXPERTS if kind == "experts" else DENSE
    model = dataclasses.replace(DENSE if kind == "dense" else EXPERTS, num_classes=5, adapter_rank=2)
    old = dataclasses.replace(old, adapter_rank=2)
    if kind == "upcycled":
        model = dataclasses.replace(model, expert_hidden=old.hidden)
    check_start(old, model)
    (_, trained), (graph, fresh) = network(old, 0), nnx.split(model.build(nnx.Rngs(1)), nnx.Param)
    params = started(old, trained, model, fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert params["label"]["table"].shape == (6, 32)
    for (path, found), (_, new) in zip(nnx.to_flat_state(params), nnx.to_flat_state(fresh), strict=True):
        source = dict(nnx.to_flat_state(trained)).get(path)
        if path == ("label", "table"):
            np.testing.assert_array_equal(found[...], new[...])
        elif source is not None and source.shape == found.shape:
            np.testing.assert_array_equal(found[...], source[...])
        else:
            assert kind == "upcycled" and path[0] == "blocks", path
    image, t = jax.numpy.zeros((2, 4, 4, 1)), jax.numpy.array([0.1, 0.9])
    assert np.isfinite(nnx.merge(graph, params)(image, t, jax.numpy.array([4, 5]))).all()
    assert changes(old, model).startswith("5 classes instead of 3, so the class embedding is new")


def test_a_new_embedding_must_be_trained():
    model = dataclasses.replace(DENSE, num_classes=5)
    for names in ((), ("label",), ("lora_a", "table")):
        check_trained(DENSE, model, names)
    with pytest.raises(UserError, match="does not train it: add label"):
        check_trained(DENSE, model, ("lora_a", "lora_b"))
    check_trained(DENSE, DENSE, ("lora_a",))


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_another_image_size_takes_all_parameters_and_shared_patches_keep_their_positions(positions):
    old = dataclasses.replace(DENSE, positions=positions)
    model = dataclasses.replace(old, image_shape=(4, 8, 1))
    check_start(old, model)
    (graph_old, trained), (graph, fresh) = network(old, 0), nnx.split(model.build(nnx.Rngs(1)), nnx.Param)
    params = started(old, trained, model, fresh)
    for found, source in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(found, source)
    assert changes(old, model) == "images of 4 x 8 instead of 4 x 4, with positions at the same spacing"
    image = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
    wide = jax.numpy.concatenate([image, image], axis=2)
    tokens = lambda graph, params, image: nnx.merge(graph, params).embed(
        image, jax.numpy.zeros(1), jax.numpy.zeros(1, int)
    )
    x_old, _, rotation_old = tokens(graph_old, trained, image)
    x, _, rotation = tokens(graph, params, wide)
    same = np.array([0, 1, 4, 5])  # of a grid of 2 x 4, the patches of the left half
    np.testing.assert_allclose(x[:, same], x_old, atol=1e-6)
    if positions == "rope":
        for wider, narrower in zip(jax.tree.leaves(rotation), jax.tree.leaves(rotation_old), strict=True):
            np.testing.assert_allclose(np.asarray(wider)[..., same, :], narrower, atol=1e-6)
