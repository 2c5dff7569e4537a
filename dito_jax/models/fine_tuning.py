"""Warm start of a model from trained parameters: the same model, new classes or adapters, or upcycled to an MoE.

The number of classes and the image size may differ. With another number of classes the class embedding is new, the row
"no class" included. No parameter depends on the image size: positions are computed from the grid of patches, with the
same distance between neighbours, so a larger image has positions that the earlier run has not seen.
"""

from collections.abc import Collection

from flax import nnx

from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.models.upcycling import check_upcycling, differences, upcycled


CLASS_EMBEDDING = ("label", "table")  # its path
MAY_DIFFER = ("num_classes", "image_shape")


def check_start(old: DiTConfig, model: DiTConfig) -> None:
    """Raises UserError, in one line, unless `model` can be initialized from parameters of `old`."""
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        return check_upcycling(old, model)
    if isinstance(old, MoEDiTConfig) and not isinstance(model, MoEDiTConfig):
        raise UserError("init_from: the model of that run has experts, and this model has none.")
    if old.image_shape[2] != model.image_shape[2]:
        raise UserError(
            f"init_from: the images of that run have {old.image_shape[2]} channels, those of this one "
            f"{model.image_shape[2]}: the first and last layers do not fit."
        )
    if differ := differences(old, model, but=("adapter_rank", *MAY_DIFFER)):
        raise UserError(f"init_from: the model of that run differs from this one: {differ}.")
    if old.adapter_rank not in (0, model.adapter_rank):
        rank = old.adapter_rank
        raise UserError(f"init_from: that run has adapters of rank {rank}: set model.adapter_rank to {rank}.")


def started(old: DiTConfig, params: nnx.State, model: DiTConfig, fresh: nnx.State) -> nnx.State:
    """The parameters of `model`: those of `old` from `params`, all others from `fresh`.

    The others are adapters, routers, and the class embedding if the number of classes differs.
    """
    if _upcycles(old, model):
        assert isinstance(model, MoEDiTConfig)
        params = upcycled(params, fresh, model)
    trained = dict(nnx.to_flat_state(params))
    new = CLASS_EMBEDDING if old.num_classes != model.num_classes else None
    result = [
        (path, variable if path == new else trained.get(path, variable)) for path, variable in nnx.to_flat_state(fresh)
    ]
    return nnx.from_flat_state(result)


def changes(old: DiTConfig, model: DiTConfig) -> str:
    """What `model` has that the model with these parameters had not, and what is taken; empty if nothing differs."""
    said = []
    if old.num_classes != model.num_classes:
        said.append(
            f"{model.num_classes} classes instead of {old.num_classes}, so the class embedding is new, and everything "
            "else is taken from it"
        )
    if old.image_shape != model.image_shape:
        now, before = ("{} x {}".format(*shape[:2]) for shape in (model.image_shape, old.image_shape))
        said.append(f"images of {now} instead of {before}, with positions at the same spacing")
    return "; ".join(said)


def check_trained(old: DiTConfig, model: DiTConfig, trainable: Collection[str]) -> None:
    """Raises UserError if the class embedding is new and would stay untrained; `trainable` are names, empty: all."""
    if old.num_classes != model.num_classes and trainable and set(trainable).isdisjoint(CLASS_EMBEDDING):
        raise UserError(
            f"init_from: {model.num_classes} classes instead of {old.num_classes}, so the class embedding is new, and "
            "train.trainable does not train it: add label."
        )


def _upcycles(old: DiTConfig, model: DiTConfig) -> bool:
    return isinstance(model, MoEDiTConfig) and not isinstance(old, MoEDiTConfig)
