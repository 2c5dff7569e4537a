"""Expert parallelism: three exchanges that move rows to the devices of their experts and back.

Each exchange runs inside `sharding.on_mesh` on one device's tokens and one device's experts. Devices along the mesh
axis "expert" hold different tokens and different experts. Numbers moved per device, for width D, k experts per token,
T tokens per device and P devices along the axis:

    gather       (P - 1) T D each way: all-gather of the tokens; each device computes the rows of its own experts
    all_to_all   k T D (P - 1) / P each way: all-to-all of capacity slots, equally many per expert and sender
    ragged       k T D (P - 1) / P each way: ragged all-to-all of the rows themselves, for any load

gather and all_to_all run on every platform; ragged runs on GPUs and is emulated elsewhere for tests.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas import Assignments, backend, combine, dispatch, expert_mlp, in_order, to_slots


AXIS = "expert"
ExchangeName = Literal["gather", "all_to_all", "ragged"]
Exchange = Callable[..., Float[Array, "T D"]]


def default_exchange(active: int, devices: int, *, even: bool, gpu: bool) -> ExchangeName:
    """The exchange that moves least among those that drop no rows.

    gather moves (P - 1) T D, the others k T D (P - 1) / P, so gather is chosen if k >= P. Otherwise all_to_all is
    chosen if every expert has the same number of rows (`even`: expert choice), where its slots are exact; else ragged,
    or gather on other platforms than GPUs.
    """
    if active >= devices:
        return "gather"
    return "all_to_all" if even else "ragged" if gpu else "gather"


def local(x, assignments: Assignments, w_gate_up, w_down, *, capacity: int | None):
    """No exchange: all experts are on this device."""
    del capacity
    return expert_mlp(x, assignments.route(), w_gate_up, w_down)


def gather(x, assignments: Assignments, w_gate_up, w_down, *, capacity: int | None):
    """All-gathers the tokens, computes the rows of this device's experts and reduce-scatters the sums.

    Arrays of rows are sized for the worst load, P times the rows of one device; the unused part costs memory, not
    time. A token's partial sums from different devices are added in the dtype of x.
    """
    del capacity
    mine = w_down.shape[0]
    x = lax.all_gather(x, AXIS, tiled=True)
    everyones = jax.tree.map(lambda a: lax.all_gather(a, AXIS), assignments).joined()
    expert = everyones.expert - lax.axis_index(AXIS) * mine
    expert = jnp.where((expert >= 0) & (expert < mine), expert, mine)
    of_mine = Assignments(everyones.token, expert, everyones.weight, everyones.num_tokens, num_experts=mine)
    y = expert_mlp(x, of_mine.route(), w_gate_up, w_down)
    return lax.psum_scatter(y, AXIS, tiled=True)


def all_to_all(x, assignments: Assignments, w_gate_up, w_down, *, capacity: int | None):
    """All-to-all of capacity slots: `capacity` per expert and sending device; rows beyond it were dropped before.

    An empty slot holds zeros, is computed like the others and has weight 0.
    """
    assert capacity is not None
    mine, devices = w_down.shape[0], lax.axis_size(AXIS)
    routing = assignments.route()
    slots = to_slots(routing, capacity)
    filled = (jnp.arange(capacity, dtype=jnp.int32) < routing.group_sizes[:, None]).reshape(-1, 1)
    move = functools.partial(lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    rows = move(jnp.where(filled, dispatch(x, slots), 0))  # by sender, then expert
    place = np.arange(rows.shape[0]).reshape(devices, mine, capacity)
    by_expert = place.transpose(1, 0, 2).reshape(-1)
    routing = in_order(
        jnp.asarray(by_expert, jnp.int32),
        jnp.full((mine,), devices * capacity, jnp.int32),
        jnp.asarray(np.argsort(by_expert), jnp.int32),
    )
    return combine(move(expert_mlp(rows, routing, w_gate_up, w_down)), slots)


def ragged(x, assignments: Assignments, w_gate_up, w_down, *, capacity: int | None):
    """Ragged all-to-all: each expert receives exactly its rows, one contiguous piece from each device."""
    del capacity
    routing = assignments.route()
    n, mine, devices, me = routing.row_index.size, w_down.shape[0], lax.axis_size(AXIS), lax.axis_index(AXIS)
    sizes = lax.all_gather(routing.group_sizes, AXIS)  # (sender, expert)
    sent_from = lax.cumsum(sizes, axis=1) - sizes  # offset of each piece in its sender's rows
    of_device = sizes.reshape(devices, devices, mine)  # (sender, receiver, expert)
    arrival = jnp.swapaxes(of_device, 0, 1).swapaxes(1, 2).reshape(devices, -1)  # (receiver, expert x sender)
    lands_at = (lax.cumsum(arrival, axis=1) - arrival).reshape(devices, mine, devices)  # (receiver, expert, sender)
    pieces = lambda of: of.reshape(-1)  # flattened in the order (peer, expert)

    there = ragged_all_to_all(
        dispatch(x, routing), devices * n,
        input_offsets=pieces(sent_from[me]), send_sizes=pieces(sizes[me]),
        output_offsets=pieces(lands_at[:, :, me]), recv_sizes=pieces(of_device[:, me]),
    )  # fmt: skip
    order = jnp.arange(devices * n, dtype=jnp.int32)
    received = in_order(order, jnp.sum(of_device[:, me], axis=0, dtype=jnp.int32), order)
    back = ragged_all_to_all(
        expert_mlp(there, received, w_gate_up, w_down), n,
        input_offsets=pieces(lands_at[me].T), send_sizes=pieces(of_device[:, me]),
        output_offsets=pieces(sent_from.reshape(devices, devices, mine)[:, me]), recv_sizes=pieces(sizes[me]),
    )  # fmt: skip
    return combine(back, routing)


EXCHANGES: dict[str, Exchange] = {"gather": gather, "all_to_all": all_to_all, "ragged": ragged}


def ragged_all_to_all(
    rows: Float[Array, "R D"], num_out: int, *, input_offsets, send_sizes, output_offsets, recv_sizes
):
    """lax.ragged_all_to_all along the axis "expert" into zeros, with several pieces per device, in device order.

    XLA implements it for GPUs only. Elsewhere it is emulated by an all-gather and a selection of the rows.
    """
    if backend.target().platform != "gpu":
        return _emulated(rows, num_out, input_offsets, send_sizes, output_offsets)
    out = jnp.zeros((num_out, rows.shape[1]), rows.dtype)
    return lax.ragged_all_to_all(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=AXIS)


def _emulated(rows, num_out, input_offsets, send_sizes, output_offsets):
    per_device = input_offsets.size // lax.axis_size(AXIS)
    me = lax.axis_index(AXIS)
    mine = lambda a: lax.dynamic_slice_in_dim(lax.all_gather(a, AXIS), me * per_device, per_device, axis=1).reshape(-1)
    first, size, place = mine(input_offsets), mine(send_sizes), mine(output_offsets)  # (sender and piece,)
    number = jnp.arange(num_out, dtype=jnp.int32)[:, None]
    inside = (number >= place) & (number < place + size)
    piece = jnp.argmax(inside, axis=1)
    source = piece // per_device * rows.shape[0] + first[piece] + number[:, 0] - place[piece]
    everyones = lax.all_gather(rows, AXIS, tiled=True)
    return jnp.where(inside.any(axis=1)[:, None], everyones[jnp.where(inside.any(axis=1), source, 0)], 0)
