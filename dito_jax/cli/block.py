"""`dito block CONFIG --images 32 --gpus 1xh200`."""

import argparse
from pathlib import Path

from dito_jax.config import load, resolved
from dito_jax.errors import UserError
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.overrides import override
from dito_jax.planning.block import measure, table
from dito_jax.planning.lowering import planned_devices
from dito_jax.sharding import MeshConfig, make_mesh


def main(options: argparse.Namespace) -> None:
    """Times one block of a config's model, forward and backward, under each choice of kernels."""
    config = resolved(override(load(options.config), options.overrides))
    if options.images < 1:
        raise UserError(f"--images {options.images}: wanted at least 1.")
    if isinstance(config.model, MoEDiTConfig):
        raise UserError(f"{options.config}: blocks with experts are not compared here; give a config of a dense DiT.")
    if problems := config.model.problems():
        raise UserError("; ".join(f"model: {problem}" for problem in problems) + ".")
    mesh = make_mesh(MeshConfig(), planned_devices(options.gpus)[:1])
    where = mesh.devices.flat[0].device_kind
    if mesh.devices.flat[0].platform == "cpu":
        raise UserError("block: kernels need an NVIDIA GPU; here they can be compiled for one: --gpus 1xh200.")
    tokens = config.model.grid[0] * config.model.grid[1]
    title = f"One block of {Path(options.config).stem}, {options.images} images of {tokens} tokens, on {where}"
    print(table(measure(config.model, options.images, mesh), title))
