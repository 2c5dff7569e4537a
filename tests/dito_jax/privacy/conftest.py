"""Shared fixtures of private training: small networks that use all their parameters, and examples."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dito_jax.diffusion import path
from dito_jax.diffusion.loss import flow_matching_error
from dito_jax.models.dit import ORIGINAL, DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.clipping import ClippedSum
from dito_jax.training.state import split_model


EXAMPLES, DRAWS = 8, 2
SIZE: dict[str, Any] = dict(image_shape=(4, 4, 1), num_classes=3, patch=2, depth=2, width=32, num_heads=4)
EXPERTS: dict[str, Any] = SIZE | dict(num_experts=4, active_experts=2, balance="example", expert_hidden=16)
MODELS = {
    "modern": DiTConfig(**SIZE, num_kv_heads=2, adapter_rank=2),
    "original": DiTConfig(**SIZE, **ORIGINAL, remat=True),
    "experts": MoEDiTConfig(**EXPERTS, shared_hidden=16, capacity_factor=0.75),
    "expert_choice": MoEDiTConfig(**EXPERTS, router="expert_choice", moe_every=2),
}


def losses(network, rows):
    """Of a denoiser, one for each row, and of its router."""
    z = path.interpolate(rows["image"], rows["noise"], rows["t"])
    said, report = network.with_report(z, rows["t"], rows["label"])
    error = flow_matching_error(said, z, rows["image"], rows["t"], rows["noise"], prediction="x", loss_type="v")
    return error + report.losses


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its parameters away from zero, examples, and which of them are padding."""

    graph: Any
    params: Any
    examples: dict[str, jax.Array]
    padding: jax.Array

    def clipped_sum(self, backend, clip_norm=20.0, **options) -> ClippedSum:
        """Some of these examples' gradients are longer than 20, some shorter."""
        if backend != "microbatch":
            options.pop("microbatch", None)  # which has no meaning for the others
        return _clipped_sum(self.graph, backend, clip_norm, **options)


@functools.cache
def _clipped_sum(graph, backend, clip_norm, **options) -> ClippedSum:
    """One object for one meaning: jax.jit compiles it once, whichever tests use it."""
    return ClippedSum(graph, losses, clip_norm, backend, **options)


@pytest.fixture(scope="session")
def problem():
    """`problem("modern")`, made once."""
    made = {}

    def make(name: str) -> Problem:
        if name not in made:
            made[name] = _made(MODELS[name])
        return made[name]

    return make


def _made(config: DiTConfig) -> Problem:
    graph, _ = split_model(config)
    params, tree = jax.tree.flatten(nnx.state(config.build(nnx.Rngs(0)), nnx.Param))
    keys = jax.random.split(jax.random.key(1), len(params))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(params, keys, strict=True)]
    k_image, k_noise, k_time, k_label, k_weight = jax.random.split(jax.random.key(2), 5)
    rows = EXAMPLES, DRAWS
    examples = {
        "image": jax.random.normal(k_image, (*rows, *config.image_shape)),
        "noise": jax.random.normal(k_noise, (*rows, *config.image_shape)),
        "t": jax.random.uniform(k_time, rows, minval=0.1, maxval=0.8),
        "label": jax.random.randint(k_label, rows, 0, config.num_classes + 1),  # "no class" among them
        "weight": jax.random.uniform(k_weight, rows, minval=0.5, maxval=1.5) / DRAWS,
    }
    return Problem(graph, jax.tree.unflatten(tree, moved), examples, jnp.arange(EXAMPLES) == 3)
