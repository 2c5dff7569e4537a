"""Sparse upcycling (arXiv 2212.05055): an MoE-DiT whose experts start as copies of a dense DiT's MLPs."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig


# Fields that do not change the function that a network computes from its parameters.
SAME_FUNCTION = {"remat", "forward_mode", "kernels", "balance", "balance_weight", "z_weight", "bias_rate", "exchange"}


def differences(old: DiTConfig, model: DiTConfig, *, but: Collection[str] = ()) -> str:
    """The fields of `old` that differ in `model`, except those that do not change the computed function, as text."""
    names = [f.name for f in dataclasses.fields(old) if f.name not in SAME_FUNCTION | set(but)]
    values = {name: (getattr(old, name), getattr(model, name)) for name in names}
    return ", ".join(f"{name} {was} != {now}" for name, (was, now) in values.items() if was != now)


def check_upcycling(dense: DiTConfig, model: MoEDiTConfig) -> None:
    """Raises UserError, in one line, unless every expert of `model` can be a copy of an MLP of `dense`."""
    differ = differences(dense, model, but=("num_classes", "image_shape"))
    rules = {
        "the dense model's MLPs are not swiglu": dense.mlp != "swiglu",
        f"model.expert_hidden is {model.hidden}, the dense model's MLPs have {dense.hidden}": model.hidden
        != dense.hidden,
        f"model.shared_hidden is {model.shared_hidden}, but a dense DiT has no shared expert to copy: set it to 0": (
            model.shared_hidden > 0
        ),
        f"the dense model differs from this one: {differ}": bool(differ),
    }
    problems = [problem for problem, broken in rules.items() if broken]
    if problems:
        raise UserError(f"upcycling: {'; '.join(problems)}.")


def upcycled(dense: nnx.State, fresh: nnx.State, model: MoEDiTConfig) -> nnx.State:
    """The parameters of `dense` with its MLPs copied to all experts; the routers are those of `fresh`.

    If the expert weights of a token sum to 1, the network computes the same function as the dense one.
    """
    there, here = nnx.to_pure_dict(dense), nnx.to_pure_dict(fresh)
    blocks = here["blocks"]
    if model.moe_every == 2:
        blocks["dense"] = jax.tree.map(lambda a: a[0::2], there["blocks"])
    with_experts = jax.tree.map(lambda a: a[model.moe_every - 1 :: model.moe_every], there["blocks"])
    mlp = with_experts.pop("mlp")
    copies = lambda a: jnp.repeat(a[:, None], model.num_experts, axis=1)
    experts = {
        "gate_up_kernel": copies(mlp["gate_up"]["kernel"]),
        "down_kernel": copies(mlp["down"]["kernel"]),
    }
    blocks["moe"] = with_experts | {"mlp": blocks["moe"]["mlp"] | experts}
    result = jax.tree.map(lambda a: a, fresh)  # a copy of the tree
    nnx.replace_by_pure_dict(result, there | {"blocks": blocks})
    return result
