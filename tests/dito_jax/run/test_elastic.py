"""The same batch on fewer processes."""

import dataclasses

import pytest

from dito_jax.config import TrainConfig, load
from dito_jax.errors import UserError
from dito_jax.run.elastic import shrunk
from dito_jax.sharding import MeshConfig


def config(batch_size: int, gradient_accumulation_steps: int = 1, **mesh: int) -> TrainConfig:
    digits = load("configs/digits.py")
    train = dataclasses.replace(
        digits.train, batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps
    )
    return dataclasses.replace(digits, train=train, mesh=MeshConfig(**mesh))


@pytest.mark.parametrize(
    ("config", "devices_each", "before", "left", "used", "data", "gradient_accumulation_steps"),
    [
        (config(48), 1, 4, 3, 3, 3, 2),  # 12 a device before; 16, so in two parts of 8
        (config(64), 1, 4, 3, 2, 2, 2),  # three do not divide 64
        (config(64), 1, 4, 2, 2, 2, 2),
        (config(64, gradient_accumulation_steps=2), 1, 4, 2, 2, 2, 4),
        (config(48, data=4), 1, 4, 3, 3, 3, 2),
        (config(96, fsdp=2), 2, 4, 3, 3, 3, 2),
        (config(64, data=2, fsdp=4), 8, 1, 1, 1, 2, 1),
        (config(64, data=4, fsdp=8), 8, 4, 2, 2, 2, 2),
        (config(64, data=2, fsdp=8), 4, 4, 3, 2, 1, 2),  # half the data axis is two processes
    ],
    ids=lambda value: "" if isinstance(value, TrainConfig) else str(value),
)
def test_the_data_axis_shrinks_and_a_device_holds_no_more(
    config, devices_each, before, left, used, data, gradient_accumulation_steps
):
    got = shrunk(config, devices_each=devices_each, before=before, left=left)
    assert got == (
        used,
        ["--mesh.data", str(data), "--train.gradient_accumulation_steps", str(gradient_accumulation_steps)],
    )


def test_what_cannot_shrink_says_so():
    with pytest.raises(UserError, match="1 of 2 processes are left, and the data axis .1. cannot shrink"):
        shrunk(config(64, data=1, fsdp=16), devices_each=8, before=2, left=1)


@pytest.mark.parametrize(
    ("expert", "batch_size", "before", "left", "used", "data", "gradient_accumulation_steps"),
    [
        (2, 96, 4, 3, 3, 3, 2),
        (4, 96, 4, 3, 2, 1, 2),
        (2, 48, 3, 2, 2, 2, 3),  # in two parts a device would hold 6, no multiple of the pool
    ],
)
def test_experts_stay_where_they_are_and_the_data_axis_shrinks(
    expert, batch_size, before, left, used, data, gradient_accumulation_steps
):
    """The expert axis shards the batch too; a pool of four images is routed together."""
    got = shrunk(with_experts(expert, batch_size=batch_size), devices_each=2, before=before, left=left)
    assert got == (
        used,
        ["--mesh.data", str(data), "--train.gradient_accumulation_steps", str(gradient_accumulation_steps)],
    )


def test_experts_that_need_every_process_cannot_shrink():
    with pytest.raises(UserError, match="the data axis .1. cannot shrink"):
        shrunk(with_experts(8, batch_size=96), devices_each=2, before=4, left=1)


def with_experts(expert: int, *, batch_size: int) -> TrainConfig:
    moe = load("configs/moe_dit_digits.py")
    train = dataclasses.replace(moe.train, batch_size=batch_size, gradient_accumulation_steps=1)
    model = dataclasses.replace(moe.model, pool=4)
    return dataclasses.replace(moe, model=model, train=train, mesh=MeshConfig(expert=expert))
