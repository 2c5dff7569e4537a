"""Layers: the properties stated in their docstrings."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.layers.attention import Attention
from dito_jax.layers.embed import time_features
from dito_jax.layers.mlp import GeluMLP, SwiGLU
from dito_jax.layers.patchify import patchify, unpatchify
from dito_jax.sharding import MeshConfig, make_mesh
from kernels_pallas import Rotation


pytestmark = pytest.mark.recorded


@pytest.mark.parametrize("p", [1, 2, 4])
def test_unpatchify_undoes_patchify(p):
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    np.testing.assert_array_equal(unpatchify(patchify(image, p), p, 8, 12), image)


def test_patches_are_row_major_and_channels_last():
    image = jnp.arange(4 * 6 * 2, dtype=jnp.float32).reshape(1, 4, 6, 2)
    np.testing.assert_array_equal(patchify(image, 2)[0, 1], image[0, 0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(patchify(image, 2)[0, 3], image[0, 2:4, 0:2].reshape(-1))


def test_time_features_are_cosines_then_sines_from_fast_to_slow():
    features = np.asarray(time_features(jnp.array([0.25]))[0])
    np.testing.assert_allclose(features[[0, 128]], [np.cos(250.0), np.sin(250.0)], atol=1e-4)
    np.testing.assert_allclose(features[127], np.cos(250.0 * 1e4 ** (-127 / 128)), atol=1e-6)


@pytest.mark.parametrize("width", [96, 384, 1024, 1152])
def test_swiglu_has_as_many_parameters_as_gelu_to_two_percent(width):
    assert 3 * SwiGLU.hidden(width) == pytest.approx(2 * GeluMLP.hidden(width), rel=0.02)
    assert SwiGLU.hidden(width) % 16 == 0


@pytest.mark.parametrize("layer", [GeluMLP, SwiGLU])
def test_a_fused_mlp_is_the_plain_one_on_a_mesh_too(layer):
    """The image and every gradient, with F over two devices whose halves are added up, and a bias added once."""
    x, d_y = jax.random.normal(jax.random.key(0), (2, 4, 3, 32))

    def passes(implementation):
        graph, params = nnx.split(layer(32, implementation=implementation, rngs=nnx.Rngs(0)), nnx.Param)
        params = jax.tree.map(lambda p: p + 0.1, params)  # biases too
        y, vjp = jax.vjp(jax.jit(lambda p, x: nnx.merge(graph, p)(x)), params, x)
        return [y, *jax.tree.leaves(vjp(d_y))]

    want = passes(None)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), np.array(jax.devices()))
    for where in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with where:
            got = passes("xla")
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("rows", [1, 8])
def test_attention_turns_by_one_rotation_or_each_examples_own_on_a_mesh_too(rows):
    positions = jax.random.randint(jax.random.key(0), (rows, 6, 1), 0, 50)
    x, rotation = jax.random.normal(jax.random.key(1), (8, 6, 32)), Rotation.of(positions, (8,))
    attention = lambda x: Attention(32, 4, 2, qk_norm=True, rngs=nnx.Rngs(0))(x, rotation)
    want = jax.jit(attention)(x)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), np.array(jax.devices()))):
        got = jax.jit(attention)(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
