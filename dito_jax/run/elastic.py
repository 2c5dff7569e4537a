"""Elastic downscaling: the same global batch on fewer processes, with more gradient accumulation if needed."""

import dataclasses

from dito_jax.config import TrainConfig, check
from dito_jax.errors import UserError
from dito_jax.sharding import batch_pieces


def shrunk(config: TrainConfig, *, devices_each: int, before: int, left: int) -> tuple[int, list[str]]:
    """How many of the `left` processes a run can use that had `before`, and the options that make it fit.

    The batch stays what it was. The data axis shrinks, the other axes stay; train.gradient_accumulation_steps grows
    just enough that no device holds more images at a time than before.

    Raises:
      UserError: no number of them does.
    """
    axes = config.mesh.resolve(before * devices_each)
    most = config.train.batch_size / (batch_pieces(axes) * config.train.gradient_accumulation_steps)
    for used in range(left, 0, -1):
        data, rest = divmod(axes["data"] * used, before)
        if rest:
            continue
        pieces = batch_pieces(axes | {"data": data})
        for gradient_accumulation_steps in range(config.train.gradient_accumulation_steps, config.train.batch_size + 1):
            if config.train.batch_size / (pieces * gradient_accumulation_steps) > most:
                continue
            fitted = dataclasses.replace(
                config,
                mesh=dataclasses.replace(config.mesh, data=data),
                train=dataclasses.replace(config.train, gradient_accumulation_steps=gradient_accumulation_steps),
            )
            try:
                check(fitted, used * devices_each)
            except UserError:
                continue
            return used, [
                "--mesh.data",
                str(data),
                "--train.gradient_accumulation_steps",
                str(gradient_accumulation_steps),
            ]
    raise UserError(
        f"mesh: {left} of {before} processes are left, and the data axis ({axes['data']}) cannot shrink to fit them "
        f"with train.batch_size {config.train.batch_size}: bring the others back, or give another mesh."
    )
