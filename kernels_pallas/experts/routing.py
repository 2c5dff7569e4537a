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

from .. import arguments


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

    The assignments of P pools of num_tokens tokens have a leading dimension P; `joined` concatenates them. The methods
    raise ValueError for a token that is not 0, ..., num_tokens - 1 or an expert that is not 0, ..., num_experts. Under
    jit such an assignment is unassigned.
    """

    token: Any  # int32 (n,) or (P, n)
    expert: Any  # int32, the same
    weight: Any  # float32, the same
    num_tokens: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})

    def joined(self) -> "Assignments":
        """The assignments of all pools as one list; tokens are numbered through all pools."""
        settled = self._settled(2)
        pools = self.token.shape[0]
        token = settled.token + self.num_tokens * jnp.arange(pools, dtype=jnp.int32)[:, None]
        flat = (token.reshape(-1), settled.expert.reshape(-1), settled.weight.reshape(-1))
        return Assignments(*flat, num_tokens=pools * self.num_tokens, num_experts=self.num_experts)

    def rows_of_experts(self) -> Int[Array, " E"]:
        """The number of assignments of each expert."""
        experts = jnp.arange(self.num_experts, dtype=jnp.int32)
        return jnp.sum(self._settled().expert[:, None] == experts, axis=0, dtype=jnp.int32)

    def within(self, capacity: int) -> tuple["Assignments", Int[Array, ""]]:
        """Keeps the first `capacity` assignments of each expert; also returns how many assignments were dropped."""
        capacity = arguments.whole_number("Assignments.within", "capacity", capacity, 0)
        settled = self._settled()
        chosen = settled.expert[:, None] == jnp.arange(self.num_experts, dtype=jnp.int32)
        # The rank of each assignment at its expert, from 1; 0 if unassigned.
        place = jnp.sum(jnp.where(chosen, lax.cumsum(chosen.astype(jnp.int32)), 0), axis=1)
        kept = dataclasses.replace(settled, expert=jnp.where(place <= capacity, settled.expert, self.num_experts))
        return kept, jnp.sum(place > capacity, dtype=jnp.int32)

    def route(self) -> Routing:
        """Sorts the assignments by expert: a `Routing` with R = n rows. The sort is stable.

        The gradient of `weight` is a gather, because each assignment is one row.
        """
        settled = self._settled()
        order = jnp.argsort(settled.expert, stable=True)
        taken = lambda x: x.at[order].get(unique_indices=True, mode="promise_in_bounds")
        expert = taken(settled.expert)
        exists = expert < self.num_experts
        row_index = jnp.where(exists, taken(settled.token), self.num_tokens)
        inverse = jnp.argsort(row_index, stable=True)
        return Routing(
            row_index=jnp.where(exists, row_index, 0),
            group_sizes=_sizes(expert, self.num_experts),
            row_weight=jnp.where(exists, taken(settled.weight), 0),
            inverse=inverse.astype(jnp.int32),
            token_sizes=_sizes(row_index[inverse], self.num_tokens),
        )

    def _settled(self, ndim: int = 1) -> "Assignments":
        """The same with int32 numbers in range and float32 weights: the one place where assignments are checked."""
        name, T, E = "Assignments", self.num_tokens, self.num_experts
        [weight] = arguments.floats(name, weight=self.weight)
        shapes = [getattr(x, "shape", ()) for x in (self.token, self.expert, weight)]
        if len(set(shapes)) > 1 or len(weight.shape) != ndim:
            raise ValueError(
                f"{name}: token {shapes[0]}, expert {shapes[1]} and weight {shapes[2]} must have one shape, "
                f"{'(P, n); route one pool' if ndim == 2 else '(n,); join pools'}."
            )
        expert = arguments.int32(name, "expert", self.expert, 0, E, outside=E, wanted=f"0 to {E} ({E}: unassigned)")
        token = arguments.int32(name, "token", self.token, 0, T - 1, outside=-1)
        if not arguments.known(token):
            expert, token = jnp.where(token < 0, E, expert), jnp.maximum(token, 0)
        return dataclasses.replace(self, token=token, expert=expert, weight=weight.astype(jnp.float32))


def to_slots(routing: Routing, capacity: int) -> Routing:
    """The same assignments in E x capacity slots (capacity-factor layout): expert e has the rows from e x capacity on.

    An empty slot has token 0 and weight 0 and is not in `inverse`.

    Raises:
      ValueError: an expert has more than `capacity` assignments. Under jit the rows beyond the capacity are dropped.
    """
    capacity = arguments.whole_number("to_slots", "capacity", capacity, 1)
    routing = settled("to_slots", routing)
    if arguments.known(routing.group_sizes):
        arguments.int32(
            "to_slots", "routing.group_sizes", routing.group_sizes, 0, capacity, wanted=f"within {capacity=}"
        )
    E, n = routing.group_sizes.size, routing.row_index.size
    first = starts(routing.group_sizes)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    filled = slot < routing.group_sizes[:, None]  # (E, capacity)
    nowhere = n + jnp.arange(E * capacity, dtype=jnp.int32).reshape(E, capacity)
    row = jnp.where(filled, first[:, None] + slot, nowhere).reshape(-1)
    taken = lambda x: x.at[row].get(unique_indices=True, mode="fill", fill_value=0)
    number = jnp.arange(n, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(lax.cumsum(routing.group_sizes), number, side="right"), E - 1)
    place = number - first[expert]
    slot_of_row = expert.astype(jnp.int32) * capacity + place
    inverse, token_sizes = _without(place >= capacity, slot_of_row, routing)
    return Routing(
        row_index=taken(routing.row_index),
        group_sizes=jnp.full((E,), capacity, jnp.int32),
        row_weight=taken(routing.row_weight),
        inverse=inverse,
        token_sizes=token_sizes,
    )


def _without(dropped, slot_of_row, routing: Routing):
    """(inverse, token_sizes) of the rows that are not dropped, each at its slot."""
    kept = ~dropped[routing.inverse]
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), lax.cumsum(kept.astype(jnp.int32))])
    place = jnp.where(kept, before[:-1], kept.size)
    inverse = jnp.zeros_like(slot_of_row).at[place].set(slot_of_row[routing.inverse], mode="drop")
    ends = lax.cumsum(routing.token_sizes)
    return inverse, before[ends] - before[ends - routing.token_sizes]


def settled(function: str, routing: Any, *, num_tokens: int | None = None) -> Routing:
    """The routing with int32 numbers in range and float32 weights, checked for the public `function`.

    Raises:
      ValueError: it is no `Routing`, its arrays do not fit together, or a known value is out of range.
    """
    if not isinstance(routing, Routing):
        cure = "; call its route()" if isinstance(routing, Assignments) else ""
        raise ValueError(f"{function}: routing must be a Routing, got {arguments.kind_of(routing)}{cure}.")
    names = [field.name for field in dataclasses.fields(routing)]
    fields = {f"routing.{name}": getattr(routing, name) for name in names}
    arguments.nonempty(function, **dict(zip(fields, arguments.arrays(function, **fields), strict=True)))
    [weight] = arguments.floats(function, **{"routing.row_weight": routing.row_weight})
    shapes = {name: fields[f"routing.{name}"].shape for name in names}
    if any(len(shape) != 1 for shape in shapes.values()) or shapes["row_index"] != shapes["row_weight"]:
        raise ValueError(
            f"{function}: the arrays of the routing do not fit together, got {shapes}; make it by Assignments.route."
        )
    (R,), (T,) = shapes["row_index"], shapes["token_sizes"]
    check = lambda name, most: arguments.int32(function, f"routing.{name}", getattr(routing, name), 0, most)
    sizes = lambda name, total: arguments.sizes(function, f"routing.{name}", getattr(routing, name), total)
    return Routing(
        row_index=check("row_index", (T if num_tokens is None else num_tokens) - 1),
        group_sizes=sizes("group_sizes", R),
        row_weight=weight.astype(jnp.float32),
        inverse=check("inverse", R - 1),
        token_sizes=sizes("token_sizes", shapes["inverse"][0]),
    )


def in_order(row_index: Int[Array, " R"], group_sizes: Int[Array, " E"], inverse: Int[Array, " R"]) -> Routing:
    """A routing in which each row is its own token with weight 1; `row_index` and `inverse` are permutations.

    Raises:
      ValueError: an array is no vector of integers, or a known value is out of range.
    """
    name = "in_order"
    for called, x in (("row_index", row_index), ("group_sizes", group_sizes), ("inverse", inverse)):
        arguments.nonempty(name, **{called: arguments.integers(name, called, x, ndim=1)})
    if row_index.shape != inverse.shape:
        raise ValueError(f"{name}: row_index {row_index.shape} and inverse {inverse.shape} must have one shape, (R,).")
    row_index = arguments.int32(name, "row_index", row_index, 0, row_index.size - 1)
    inverse = arguments.int32(name, "inverse", inverse, 0, row_index.size - 1)
    group_sizes = arguments.sizes(name, "group_sizes", group_sizes, row_index.size)
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
