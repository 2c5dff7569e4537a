"""The check at a private run's start: networks of the project pass, a hook that leaves something out does not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.layers import gradient_hooks, hooked_gradients
from dito_jax.privacy import ghost_clipping, gradient_check
from dito_jax.privacy.gradient_check import check_gradients
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.program import LoopConfig

from .conftest import MODELS


pytestmark = pytest.mark.recorded


PRIVACY = PrivacyConfig(epsilon=1.0, dataset="digits")
LOOP = LoopConfig(steps=1, batch_size=8, compute_dtype="float32")
ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


def check(model, backend="ghost", mesh=ONE, **loop):
    made = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    with jax.set_mesh(made):
        loop = dataclasses.replace(LOOP, **loop)
        check_gradients(MODELS[model], LossConfig(), loop, made, dataclasses.replace(PRIVACY, backend=backend))


@pytest.mark.parametrize(
    ("model", "backend", "mesh", "loop"),
    [
        ("modern", "ghost", ONE, {}),
        ("original", "bookkeeping", ONE, dict(compute_dtype="bfloat16")),
        ("experts", "ghost", ONE, dict(compute_dtype="bfloat16")),
        ("modern", "bookkeeping", EIGHT, dict(trainable=("lora_a", "lora_b", "bias"))),
    ],
)
def test_the_projects_networks_pass(model, backend, mesh, loop):
    check(model, backend, mesh, **loop)


@pytest.mark.parametrize("backend", ["ghost", "bookkeeping"])
def test_a_part_of_the_gradient_that_hooks_leave_out_is_told(backend, monkeypatch):
    def without_rows_but_one(hooked, factor, shape):
        d_y = hooked.outputs.astype(jnp.float32).reshape(factor.size, -1, *shape)
        return hooked_gradients.weighted_sum(d_y[:, 0], factor)

    for module in (gradient_hooks, ghost_clipping):
        monkeypatch.setattr(module, "bias_gradient", without_rows_but_one)
    with pytest.raises(UserError, match=rf"privacy.backend '{backend}': .* by hooks .* by jax.grad.*'microbatch'"):
        check("modern", backend)


def test_a_norm_that_leaves_something_out_is_told(monkeypatch):
    norm_sq = ghost_clipping.Hooks.norm_sq
    monkeypatch.setattr(ghost_clipping.Hooks, "norm_sq", lambda self, hooked: 0.9 * norm_sq(self, hooked))
    with pytest.raises(UserError, match="clipping would not bound it"):
        check("modern")


def test_backends_without_hooks_are_not_checked(monkeypatch):
    monkeypatch.setattr(gradient_check, "split_model", None)
    check("modern", "microbatch")
