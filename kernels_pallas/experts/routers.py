"""MoE routers: top-k softmax, top-k sigmoid, expert choice, expert race, and routing by a given index.

A router is a function from the logits of one pool of tokens to `Assignments`; use vmap for several pools. The selection
has no gradient; gradients flow through the weights. Everything is computed in float32. Among equal scores the lowest
index is selected. Scores that underflow keep their ratios, so weights that are divided by their sum are never 0 / 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .. import arguments
from .routing import Assignments


def top_k_softmax(logits: Float[Array, "T E"], *, active: int, normalize: bool = False) -> Assignments:
    """Top-k routing: each token takes the `active` experts with the highest softmax(logits), which are the weights.

    `normalize` divides a token's weights by their sum.

    Raises:
      ValueError: there are fewer than `active` experts.

    Source: https://arxiv.org/abs/1701.06538 and, without its noise, https://arxiv.org/abs/2101.03961, equation 1.
    """
    name, logits = "top_k_softmax", _logits("top_k_softmax", logits)
    normalize, active = arguments.flag(name, "normalize", normalize), _integer(name, active=active)
    _require(1 <= active <= logits.shape[1], name, f"{active=}", f"1 to {logits.shape[1]} experts per token")
    weight, expert = lax.top_k(softmax_scores(logits), active)
    if normalize:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return _of_tokens(expert, weight, logits)


def top_k_sigmoid(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    *,
    active: int,
    groups: int = 1,
    active_groups: int = 1,
    scale: float = 1.0,
) -> Assignments:
    """DeepSeek-V3 routing: each token takes the `active` experts with the highest sigmoid(logits) + bias.

    A token's weights are scale sigmoid(logits), divided by their sum. The bias affects the selection only and has no
    gradient; `update_bias` updates it. With group-limited routing, consecutive experts form `groups` groups, and a
    token selects among the experts of its `active_groups` best groups: those with the largest sum of the two highest
    biased scores.

    Raises:
      ValueError: `groups` does not divide the experts, or there are fewer than `active` experts in a token's groups.

    Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 12 to 16, and its node-limited routing.
    """
    name, logits = "top_k_sigmoid", _logits("top_k_sigmoid", logits)
    T, E = logits.shape
    [bias] = arguments.floats(name, bias=bias)
    if bias.shape != (E,):
        raise ValueError(f"{name}: bias must be one number per expert, (E,) = {(E,)}, got {bias.shape}.")
    scale = arguments.number(name, "scale", scale, "multiply the weights by it")
    active, groups = _integer(name, active=active), _integer(name, groups=groups)
    active_groups = _integer(name, active_groups=active_groups)
    size = E // max(groups, 1)
    _require(groups >= 1 and E % groups == 0, name, f"{groups=}", f"a divisor of {E} experts")
    _require(1 <= active_groups <= groups, name, f"{active_groups=}", f"1 to {groups} groups")
    _require(1 <= active <= active_groups * size, name, f"{active=}", f"1 to {active_groups * size} experts per token")
    score = jax.nn.sigmoid(logits.astype(jnp.float32))
    biased = lax.stop_gradient(score + bias.astype(jnp.float32))
    if groups > 1:
        of_group = biased.reshape(T, groups, size)
        best = jnp.sum(lax.top_k(of_group, min(2, size))[0], axis=-1)
        chosen = lax.top_k(best, active_groups)[1]  # (T, active_groups)
        among = jnp.any(chosen[:, :, None] == jnp.arange(groups, dtype=chosen.dtype), axis=1)
        biased = jnp.where(among[:, :, None], of_group, -jnp.inf).reshape(T, E)
    expert = lax.top_k(biased, active)[1]
    weight = scale * _shares(jnp.take_along_axis(logits.astype(jnp.float32), expert, axis=-1))
    return _of_tokens(expert, weight, logits)


def expert_choice(logits: Float[Array, "T E"], *, rows: int) -> Assignments:
    """Expert-choice routing: each expert takes the `rows` tokens with the highest softmax(logits) for this expert.

    The weights are softmax(logits) over experts. A token may have any number of experts, including none. The load is
    balanced by construction.

    Raises:
      ValueError: there are fewer than `rows` tokens.

    Source: https://arxiv.org/abs/2202.09368, section 3.2; in diffusion EC-DiT, https://arxiv.org/abs/2410.02098.
    """
    logits, rows = _logits("expert_choice", logits), _integer("expert_choice", rows=rows)
    T, E = logits.shape
    _require(1 <= rows <= T, "expert_choice", f"{rows=}", f"1 to {T} tokens per expert")
    score = softmax_scores(logits).T
    token = jnp.sort(lax.top_k(lax.stop_gradient(score), rows)[1], axis=-1)  # sorted for contiguous reads
    weight = jnp.take_along_axis(score, token, axis=-1)
    expert = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[:, None], token.shape)
    return Assignments(token.reshape(-1), expert.reshape(-1), weight.reshape(-1), num_tokens=T, num_experts=E)


def race(logits: Float[Array, "T E"], *, rows: int) -> Assignments:
    """Expert-race routing: selects the `rows` highest of all T x E scores softmax(logits), which are the weights.

    A token may have any number of experts, and an expert any number of tokens. The scores are the softmax over experts,
    as in the other routers here; the paper also uses other scores.

    Raises:
      ValueError: there are fewer than `rows` scores.

    Source: Race-DiT's expert race, https://arxiv.org/abs/2503.16057, section 3.
    """
    logits, rows = _logits("race", logits), _integer("race", rows=rows)
    T, E = logits.shape
    _require(1 <= rows <= T * E, "race", f"{rows=}", f"1 to {T * E} scores")
    score = softmax_scores(logits).reshape(-1)
    place = jnp.sort(lax.top_k(lax.stop_gradient(score), rows)[1])
    return Assignments(place // E, place % E, score[place], num_tokens=T, num_experts=E)


def by_index(index: Int[Array, " T"], *, num_experts: int, weight: Float[Array, " T"] | None = None) -> Assignments:
    """Hard routing: each token goes to the expert index[t], or to no expert if that is num_experts; default weight 1.

    For experts that are selected without a router, such as by the modality of a token or the timestep of its image.
    Under jit, where the indices are not known, an index out of range, such as -1, means no expert.

    Raises:
      ValueError: an index is known and not 0, ..., num_experts, or the arrays are no (T,) of integers and of numbers.
    """
    name, E = "by_index", arguments.whole_number("by_index", "num_experts", num_experts, 1)
    index = arguments.integers(name, "index", index, ndim=1)
    arguments.nonempty(name, index=index)
    index = arguments.int32(name, "index", index, 0, E, outside=E, wanted=f"0 to {E}, where {E} means no expert")
    [weights] = arguments.floats(name, weight=jnp.ones(index.shape, jnp.float32) if weight is None else weight)
    if weights.shape != index.shape:
        raise ValueError(f"{name}: weight must be one number per token, (T,) = {index.shape}, got {weights.shape}.")
    token = jnp.arange(index.size, dtype=jnp.int32)
    return Assignments(token, index, weights.astype(jnp.float32), num_tokens=index.size, num_experts=E)


def softmax_scores(logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """softmax over experts, float32; uniform if all logits of a token are -inf."""
    return _softmax(_logits("softmax_scores", logits).astype(jnp.float32))


def sigmoid_scores(logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """sigmoid, divided by its sum over experts, float32: the probability in DeepSeek-V3's balance loss, equation 19."""
    return _shares(_logits("sigmoid_scores", logits).astype(jnp.float32))


def _shares(logits):
    """sigmoid(logits) divided by its sum over the last dimension, as the softmax of log(sigmoid(logits)).

    The sigmoids themselves underflow below logits of -88, and the gradient of the quotient overflows below -44.
    """
    return _softmax(jax.nn.log_sigmoid(jnp.maximum(logits, jnp.finfo(jnp.float32).min)))


def _softmax(scores):
    return jax.nn.softmax(jnp.maximum(scores, jnp.finfo(jnp.float32).min), axis=-1)


def _logits(function: str, logits) -> jax.Array:
    """The logits (T, E); raises ValueError if they are anything else."""
    [logits] = arguments.floats(function, logits=logits)
    if logits.ndim != 2:
        raise ValueError(f"{function}: logits must be (T, E), got {logits.shape}; use jax.vmap for several pools.")
    return logits


def _integer(function: str, **named) -> int:
    [(name, value)] = named.items()
    return arguments.whole_number(function, name, value, -arguments.LARGEST)


def _of_tokens(expert, weight, logits) -> Assignments:
    """The `Assignments` of (T, active) choices, token after token."""
    (T, E), active = logits.shape, expert.shape[1]
    token = jnp.repeat(jnp.arange(T, dtype=jnp.int32), active, total_repeat_length=T * active)
    return Assignments(token, expert.reshape(-1), weight.reshape(-1), num_tokens=T, num_experts=E)


def _require(holds: bool, name: str, given: str, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {given}; wanted {wanted}.")
