"""Configs that mix or leak examples are refused, with the reason and what to do."""

import dataclasses

import pytest

from dito_jax import config as configs
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.data import ImageFolderData
from dito_jax.errors import UserError
from dito_jax.models.kernels import KernelsConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.settings import PrivacyConfig


pytestmark = pytest.mark.recorded("configs")


PRIVATE = PrivacyConfig(epsilon=8.0, delta=1e-4, dataset="digits")
EXPERTS = dict(num_experts=4, active_experts=2, balance="example", expert_hidden=16)


def config_of(model=None, **changes):
    base = configs.load("configs/digits.py")
    model = base.model if model is None else model_of(**model)
    return dataclasses.replace(base, model=model, **{"privacy": PRIVATE} | changes)


def model_of(**options):
    dense = configs.load("configs/digits.py").model
    return MoEDiTConfig(**{f.name: getattr(dense, f.name) for f in dataclasses.fields(dense)} | EXPERTS | options)


@pytest.mark.parametrize("model", [None, {}, {"router": "expert_choice"}, {"capacity_factor": 1.0}])
def test_models_that_keep_examples_apart_are_taken(model):
    configs.check(config_of(model), 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            {"pool": 2, "router": "expert_choice", "balance": "batch", "balance_weight": 0.0, "z_weight": 0.0},
            "model.pool 2 lets images compete for experts.*set it to 1",
        ),
        ({"balance": "batch"}, "model.balance 'batch' makes the loss of one image depend.*'example'"),
        ({"router": "sigmoid", "bias_rate": 1e-3}, "model.bias_rate 0.001 moves the router's biases.*set it to 0"),
    ],
)
def test_routers_by_which_examples_meet_are_refused(model, reason):
    with pytest.raises(UserError, match=reason):
        configs.check(config_of(model), 1)
    configs.check(dataclasses.replace(config_of(model), privacy=PrivacyConfig()), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": None}, "name the data set whose ledger is charged"),
        ({"clip_norm": 0.0}, "clip_norm 0.0 is not positive"),
        ({"noise_multiplicity": 0}, "noise_multiplicity 0 is not positive"),
        ({"microbatch": 0}, "microbatch 0 is not positive"),
        ({"spare_steps": -1}, "spare_steps -1 is negative"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, reason):
    with pytest.raises(UserError, match=reason):
        configs.check(config_of(privacy=dataclasses.replace(PRIVATE, **changes)), 1)


def test_a_checkpoint_chosen_by_private_losses_is_refused():
    with pytest.raises(UserError, match="keep_best 1 would choose a checkpoint by the private examples"):
        configs.check(config_of(checkpoint=CheckpointConfig(keep_best=1)), 1)


def test_an_image_in_the_place_of_an_unreadable_one_is_refused():
    data = ImageFolderData(path="photos", image_size=8, max_unreadable=1)
    configs.check(config_of(data=data, privacy=PrivacyConfig()), 1)
    with pytest.raises(UserError, match="max_unreadable would put another image in the place"):
        configs.check(config_of(data=data), 1)


def test_a_kernel_that_hides_its_products_is_refused_where_they_must_be_seen():
    model = dataclasses.replace(configs.load("configs/digits.py").model, kernels=KernelsConfig(mlp="xla"))
    config = dataclasses.replace(config_of(), model=model)
    with pytest.raises(UserError, match="has no gradient hooks inside the MLP.*'microbatch'"):
        configs.check(config, 1)
    configs.check(dataclasses.replace(config, privacy=dataclasses.replace(PRIVATE, backend="microbatch")), 1)
