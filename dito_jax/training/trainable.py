"""Which parameters a run trains: all, or those that bear one of the names it is given. The others are frozen.

A name is one on the way to a parameter, as in blocks.attention.qkv.kernel: "attention" trains all of it in every
block, "lora_a" and "lora_b" all low-rank adapters, "label" the table of classes.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dito_jax.errors import UserError


type Names = tuple[str, ...]  # none: all parameters


def divided(params: nnx.State, names: Names) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen); `joined` puts them together again."""
    if not names:
        return params, nnx.State({})
    chosen: Callable[[Any, Any], bool] = lambda path, _: not set(names).isdisjoint(map(str, path))
    trained, frozen = nnx.split_state(params, chosen, ...)
    return trained, frozen


def joined(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """All parameters."""
    return nnx.merge_state(trained, frozen)


def num_trained(params: nnx.State, names: Names) -> int:
    """How many numbers are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(divided(params, names)[0]))


def check_names(params: nnx.State, names: Names) -> None:
    """Raises UserError, in one line, if a name is on the way to no parameter."""
    known = {str(part) for path, _ in nnx.to_flat_state(params) for part in path}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(sorted(known))}."
            raise UserError(f"train.trainable: no parameter of this model is under {name!r}; {hint}")
