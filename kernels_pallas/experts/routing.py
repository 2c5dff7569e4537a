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

    @classmethod
    def cotangent(cls, d_weight) -> "Routing":
        """What a backward says of a routing: its weights have a gradient, its integers none."""
        return cls(row_index=None, group_sizes=None, row_weight=d_weight, inverse=None, token_sizes=None)


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

    def within(self, capacity: int) -> tuple["Assignments", Int[Array, ""]]:
        """At most `capacity` choices of each expert, the first in the list, and how many are dropped for it."""
        chosen = self.expert[:, None] == jnp.arange(self.num_experts, dtype=self.expert.dtype)
        place = jnp.sum(jnp.where(chosen, lax.cumsum(chosen.astype(jnp.int32)), 0), axis=1)  # from 1; 0 is no choice
        kept = dataclasses.replace(self, expert=jnp.where(place <= capacity, self.expert, self.num_experts))
        return kept, jnp.sum(place > capacity, dtype=jnp.int32)

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


def to_slots(routing: Routing, capacity: int) -> Routing:
    """The same choices in E x capacity rows: expert e has the rows from e x capacity on, whether it fills them or not.

    No expert may have more choices. A row without one has token 0 and weight 0, and no place in `inverse`.
    """
    E, n = routing.group_sizes.size, routing.row_index.size
    first = starts(routing.group_sizes)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    filled = slot < routing.group_sizes[:, None]  # (E, capacity)
    nowhere = n + jnp.arange(E * capacity, dtype=jnp.int32).reshape(E, capacity)
    row = jnp.where(filled, first[:, None] + slot, nowhere).reshape(-1)
    taken = lambda x: x.at[row].get(unique_indices=True, mode="fill", fill_value=0)
    number = jnp.arange(n, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(lax.cumsum(routing.group_sizes), number, side="right"), E - 1)
    slot_of_row = expert.astype(jnp.int32) * capacity + number - first[expert]
    return Routing(
        row_index=taken(routing.row_index),
        group_sizes=jnp.full((E,), capacity, jnp.int32),
        row_weight=taken(routing.row_weight),
        inverse=slot_of_row[routing.inverse],
        token_sizes=routing.token_sizes,
    )


def in_order(row_index: Int[Array, " R"], group_sizes: Int[Array, " E"], inverse: Int[Array, " R"]) -> Routing:
    """Rows that are each a token of its own, of weight 1: `row_index` and `inverse` are permutations of them."""
    exists = jnp.arange(row_index.size, dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    sizes = exists.astype(jnp.int32)[inverse]
    return Routing(row_index, group_sizes, jnp.ones(row_index.shape, jnp.float32), inverse, sizes)


def _sizes(ascending: Int[Array, " n"], num: int) -> Int[Array, " num"]:
    """How often each of 0, ..., num - 1 occurs."""
    edges = jnp.searchsorted(ascending, jnp.arange(num + 1, dtype=ascending.dtype), side="left")
    return jnp.diff(edges).astype(jnp.int32)


def starts(sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """Where each of consecutive groups begins."""
    return lax.cumsum(sizes) - sizes
