"""Selects the trainable parameters for fine-tuning: all, or those with a given name in their path.

A name is one component of a parameter's path, such as blocks.attention.qkv.kernel: "attention" trains the attention of
every block, "lora_a" and "lora_b" all LoRA adapters, "label" the class embedding. All other parameters are frozen.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dito_jax.errors import UserError


type Names = tuple[str, ...]  # empty: all parameters


def divided(params: nnx.State, names: Names) -> tuple[nnx.State, nnx.State]:
    """Splits parameters into (trained, frozen); `joined` is the inverse."""
    if not names:
        return params, nnx.State({})
    chosen: Callable[[Any, Any], bool] = lambda path, _: not set(names).isdisjoint(map(str, path))
    trained, frozen = nnx.split_state(params, chosen, ...)
    return trained, frozen


def joined(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Merges trained and frozen parameters."""
    return nnx.merge_state(trained, frozen)


def num_trained(params: nnx.State, names: Names) -> int:
    """The number of trained parameters (scalars)."""
    return sum(leaf.size for leaf in jax.tree.leaves(divided(params, names)[0]))


def check_names(params: nnx.State, names: Names) -> None:
    """Raises UserError, in one line, if a name is in the path of no parameter."""
    known = {str(part) for path, _ in nnx.to_flat_state(params) for part in path}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(sorted(known))}."
            raise UserError(f"train.trainable: no parameter of this model has {name!r} in its path; {hint}")
