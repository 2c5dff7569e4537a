"""MoE routing data: `Assignments`, the output of a router, and `Routing`, the rows sorted by expert for the kernels.

A router returns `Assignments`: a list of (token, expert, weight). A token may have any number of experts, so top-k
routing, expert choice, expert race and hard routing all have this form. `Assignments.route` sorts the list by expert
into a `Routing`, which the kernels take.
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
    """R rows, sorted by expert (a stable sort of the assignments); a row is one token at one expert.

    Expert e has the group_sizes[e] rows after those of the experts before it. Rows from sum(group_sizes) on are
    padding: results of these rows are ignored. inverse[i] is the i-th row in the order of tokens, and of experts for
    one token; token t has token_sizes[t] rows.
    """

    row_index: Any  # int32 (R,): the token of each row
    group_sizes: Any  # int32 (E,): the number of rows of each expert
    row_weight: Any  # float32 (R,): the weight of the row's output in the token's sum
    inverse: Any  # int32 (R,): the rows in the order of tokens
    token_sizes: Any  # int32 (T,): the number of rows of each token

    @classmethod
    def cotangent(cls, d_weight) -> "Routing":
        """The cotangent of a routing: the weights have a gradient, the integers have none."""
        return cls(row_index=None, group_sizes=None, row_weight=d_weight, inverse=None, token_sizes=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """n assignments in any order: `token` goes to `expert` with `weight`; expert == num_experts means unassigned.

    The assignments of P pools of num_tokens tokens have a leading dimension P; `joined` concatenates them.
    """

    token: Any  # int32 (n,) or (P, n)
    expert: Any  # int32, the same
    weight: Any  # float32, the same
    num_tokens: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})

    def joined(self) -> "Assignments":
        """The assignments of all pools as one list; tokens are numbered through all pools."""
        pools = self.token.shape[0]
        token = self.token + self.num_tokens * jnp.arange(pools, dtype=jnp.int32)[:, None]
        flat = (token.reshape(-1), self.expert.reshape(-1), self.weight.reshape(-1))
        return Assignments(*flat, num_tokens=pools * self.num_tokens, num_experts=self.num_experts)

    def rows_of_experts(self) -> Int[Array, " E"]:
        """The number of assignments of each expert."""
        experts = jnp.arange(self.num_experts, dtype=self.expert.dtype)
        return jnp.sum(self.expert[:, None] == experts, axis=0, dtype=jnp.int32)

    def within(self, capacity: int) -> tuple["Assignments", Int[Array, ""]]:
        """Keeps the first `capacity` assignments of each expert; also returns how many assignments were dropped."""
        chosen = self.expert[:, None] == jnp.arange(self.num_experts, dtype=self.expert.dtype)
        # The rank of each assignment at its expert, from 1; 0 if unassigned.
        place = jnp.sum(jnp.where(chosen, lax.cumsum(chosen.astype(jnp.int32)), 0), axis=1)
        kept = dataclasses.replace(self, expert=jnp.where(place <= capacity, self.expert, self.num_experts))
        return kept, jnp.sum(place > capacity, dtype=jnp.int32)

    def route(self) -> Routing:
        """Sorts the assignments by expert: a `Routing` with R = n rows. The sort is stable.

        The gradient of `weight` is a gather, because each assignment is one row.
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
    """The same assignments in E x capacity slots (capacity-factor layout): expert e has the rows from e x capacity on.

    No expert may have more than `capacity` assignments. An empty slot has token 0 and weight 0 and is not in `inverse`.
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
    """A routing in which each row is its own token with weight 1; `row_index` and `inverse` are permutations."""
    exists = jnp.arange(row_index.size, dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    sizes = exists.astype(jnp.int32)[inverse]
    return Routing(row_index, group_sizes, jnp.ones(row_index.shape, jnp.float32), inverse, sizes)


def _sizes(ascending: Int[Array, " n"], num: int) -> Int[Array, " num"]:
    """The number of occurrences of each of 0, ..., num - 1 in an ascending array."""
    edges = jnp.searchsorted(ascending, jnp.arange(num + 1, dtype=ascending.dtype), side="left")
    return jnp.diff(edges).astype(jnp.int32)


def starts(sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """The start of each of the consecutive groups."""
    return lax.cumsum(sizes) - sizes
