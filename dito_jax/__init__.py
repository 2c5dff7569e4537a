"""Diffusion transformers in JAX/Flax: the names that most programs need, each imported when it is first used.

    from dito_jax import load_run

    run = load_run("runs/digits")                              # a directory that `dito train` wrote
    images = run.sample(labels=[3, 7], guidance=2.0, seed=0)   # float32 (2, 8, 8, 1) in [-1, 1]

    DiT, DiTConfig              the diffusion transformer: nnx.Module and its config
    MoEDiT, MoEDiTConfig        the same with mixtures of experts
    flow_matching_loss          the training loss
    TrainConfig, load_config    a training run's config; load_config("digits") or load_config("my_config.py")
    load_run, Run               a trained run: config, params, classes, model(), sample()
    sample, SampleConfig        samples of any model in memory
    UserError                   what every function raises for a mistake of its caller, in one line

Everything else is imported from its own module.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dito_jax.config import TrainConfig, load as load_config
    from dito_jax.diffusion.loss import flow_matching_loss
    from dito_jax.errors import UserError
    from dito_jax.evaluation.sample import SampleConfig, sample
    from dito_jax.models.dit import DiT, DiTConfig
    from dito_jax.models.moe_dit import MoEDiT, MoEDiTConfig
    from dito_jax.run.loaded_run import Run, load_run

    __version__: str

__all__ = [
    "DiT",
    "DiTConfig",
    "MoEDiT",
    "MoEDiTConfig",
    "Run",
    "SampleConfig",
    "TrainConfig",
    "UserError",
    "flow_matching_loss",
    "load_config",
    "load_run",
    "sample",
]
_MODULES = {  # name -> its module, and its name there
    "DiT": ("models.dit", "DiT"),
    "DiTConfig": ("models.dit", "DiTConfig"),
    "MoEDiT": ("models.moe_dit", "MoEDiT"),
    "MoEDiTConfig": ("models.moe_dit", "MoEDiTConfig"),
    "Run": ("run.loaded_run", "Run"),
    "SampleConfig": ("evaluation.sample", "SampleConfig"),
    "TrainConfig": ("config", "TrainConfig"),
    "UserError": ("errors", "UserError"),
    "flow_matching_loss": ("diffusion.loss", "flow_matching_loss"),
    "load_config": ("config", "load"),
    "load_run": ("run.loaded_run", "load_run"),
    "sample": ("evaluation.sample", "sample"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dito_jax.version import installed

        return installed()
    if name not in _MODULES:
        raise AttributeError(f"module 'dito_jax' has no attribute {name!r}")
    module, attribute = _MODULES[name]
    value = getattr(importlib.import_module(f"dito_jax.{module}"), attribute)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
