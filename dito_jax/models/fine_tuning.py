"""Warm start of a model from trained parameters: the same model, with new LoRA adapters, or upcycled to an MoE."""

from flax import nnx

from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.models.upcycling import check_upcycling, differences, upcycled


def check_start(old: DiTConfig, model: DiTConfig) -> None:
    """Raises UserError, in one line, unless `model` can be initialized from parameters of `old`."""
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        return check_upcycling(old, model)
    if isinstance(old, MoEDiTConfig) and not isinstance(model, MoEDiTConfig):
        raise UserError("init_from: the model of that run has experts, and this model has none.")
    if differ := differences(old, model, but=("adapter_rank",)):
        raise UserError(f"init_from: the model of that run differs from this one: {differ}.")
    if old.adapter_rank not in (0, model.adapter_rank):
        rank = old.adapter_rank
        raise UserError(f"init_from: that run has adapters of rank {rank}: set model.adapter_rank to {rank}.")


def started(old: DiTConfig, params: nnx.State, model: DiTConfig, fresh: nnx.State) -> nnx.State:
    """The parameters of `model`: those of `old` from `params`, all others (adapters, routers) from `fresh`."""
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        return upcycled(params, fresh, model)
    trained = dict(nnx.to_flat_state(params))
    result = [(path, trained.get(path, variable)) for path, variable in nnx.to_flat_state(fresh)]
    return nnx.from_flat_state(result)


def _upcycles(old: DiTConfig, model: DiTConfig) -> bool:
    return isinstance(model, MoEDiTConfig) and not isinstance(old, MoEDiTConfig)
