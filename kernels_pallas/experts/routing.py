"""Which token goes to which expert, as data: what a router decides, and the rows that kernels walk.

A router says for each of its choices a token, an expert and a weight: `Assignments`. A token may have any number of
experts, so token choice, expert choice, a race for the highest scores and hard routing are all of this one form.
`Assignments.route` sorts them by expert into a `Routing`, which is what kernels take.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """R rows, sorted by expert and within one in the order of its assignments; each is one token at one expert.

    The rows of expert e are the group_sizes[e] that follow those of the experts before it. Rows past
    sum(group_sizes) are of no expert: nothing computed from them is used. Row inverse[i] is the i-th in the order
    of tokens, those of one token in the order of experts; token t has token_sizes[t] of them.
    """

    row_index: Any  # int32 (R,): the token of each row
    group_sizes: Any  # int32 (E,)
    row_weight: Any  # float32 (R,): what the row's result counts in the token's sum
    inverse: Any  # int32 (R,)
    token_sizes: Any  # int32 (T,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """n choices in any order: `token` goes to `expert` with `weight`; expert == num_experts is no choice.

    Lists for P pools of num_tokens tokens each have a leading dimension; `joined` makes one list of them.
    """

    token: Any  # int32 (n,) or (P, n)
    expert: Any  # int32, the same
    weight: Any  # float32, the same
    num_tokens: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})

    def joined(self) -> "Assignments":
        """One list for the tokens of all pools, end to end."""
        pools = self.token.shape[0]
        token = self.token + self.num_tokens * jnp.arange(pools, dtype=jnp.int32)[:, None]
        flat = (token.reshape(-1), self.expert.reshape(-1), self.weight.reshape(-1))
        return Assignments(*flat, num_tokens=pools * self.num_tokens, num_experts=self.num_experts)

    def rows_of_experts(self) -> Int[Array, " E"]:
        """How many choices each expert has."""
        experts = jnp.arange(self.num_experts, dtype=self.expert.dtype)
        return jnp.sum(self.expert[:, None] == experts, axis=0, dtype=jnp.int32)

    def route(self) -> Routing:
        """The rows of these choices, R = n. Integer-exact, and stable: equal keys keep their order.

        Gradients flow to `weight` by a gather: each choice is one row.
        """
        order = jnp.argsort(self.expert, stable=True)
        taken = lambda x: x.at[order].get(unique_indices=True, mode="promise_in_bounds")
        expert = taken(self.expert)
        exists = expert < self.num_experts
        row_index = jnp.where(exists, taken(self.token), self.num_tokens)
        inverse = jnp.argsort(row_index, stable=True)
        return Routing(
            row_index=jnp.where(exists, row_index, 0),
            group_sizes=_sizes(expert, self.num_experts),
            row_weight=jnp.where(exists, taken(self.weight), 0),
            inverse=inverse.astype(jnp.int32),
            token_sizes=_sizes(row_index[inverse], self.num_tokens),
        )


def _sizes(ascending: Int[Array, " n"], num: int) -> Int[Array, " num"]:
    """How often each of 0, ..., num - 1 occurs."""
    edges = jnp.searchsorted(ascending, jnp.arange(num + 1, dtype=ascending.dtype), side="left")
    return jnp.diff(edges).astype(jnp.int32)


def starts(sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """Where each of consecutive groups begins."""
    return lax.cumsum(sizes) - sizes
