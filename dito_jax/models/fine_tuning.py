"""A model that begins as a trained one: the same, with adapters of its own, or with experts out of its MLPs."""

from flax import nnx

from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.models.upcycling import check_upcycling, differences, upcycled


def check_start(old: DiTConfig, model: DiTConfig) -> None:
    """Raises UserError, in one line, unless `model` can begin as `old`."""
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        return check_upcycling(old, model)
    if isinstance(old, MoEDiTConfig) and not isinstance(model, MoEDiTConfig):
        raise UserError("init_from: that run has experts, and this model has none.")
    if differ := differences(old, model, but=("adapter_rank",)):
        raise UserError(f"init_from: that run's model differs from this one: {differ}.")
    if old.adapter_rank not in (0, model.adapter_rank):
        raise UserError(f"init_from: that run has adapters of rank {old.adapter_rank}: set model.adapter_rank to it.")


def started(old: DiTConfig, params: nnx.State, model: DiTConfig, fresh: nnx.State) -> nnx.State:
    """The parameters of `model`, as `fresh`, with all that `params` of `old` have: adapters begin as they would."""
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        return upcycled(params, fresh, model)
    trained = dict(nnx.to_flat_state(params))
    result = [(path, trained.get(path, variable)) for path, variable in nnx.to_flat_state(fresh)]
    return nnx.from_flat_state(result)


def _upcycles(old: DiTConfig, model: DiTConfig) -> bool:
    return isinstance(model, MoEDiTConfig) and not isinstance(old, MoEDiTConfig)
