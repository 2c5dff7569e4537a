"""Operations as PyTorch functions, where PyTorch is installed: `from kernels_pallas import torch as kernels`.

Tensors and JAX's arrays are the same memory (DLPack), on a GPU as on a CPU, and gradients are the kernels' own. What a
backward needs of the arguments and the results is not copied either; PyTorch watches over it, and refuses the backward
if one was changed in place.

Both libraries take memory of one GPU: set XLA_PYTHON_CLIENT_PREALLOCATE=false before the first call. Each waits for
the other's stream, PyTorch's being the current one: keep to one. A call is compiled at the first of its shapes, and
torch.compile leaves it as it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from . import attention, experts, norms
from .norms.api import Kind


BACKENDS = {"cpu": "cpu", "cuda": "gpu"}  # a tensor's device as JAX calls it


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: attention.AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kernels_pallas.flash_attention` of tensors: q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H),
    and with return_lse (B, T, N), float32.

    The mask's vectors are arrays of JAX; of tensors, `to_jax` makes some. Those that lie on the host are moved at each
    call: jax.device_put(mask), once, saves that.

    Raises:
      ValueError: as the function of arrays; or a tensor is not on JAX's device, or of float64.
      NotImplementedError: the named implementation cannot run these arguments here.
    """
    options = {"scale": scale, "softcap": softcap, "return_lse": return_lse, "implementation": implementation}
    return _call(_flash_attention, (q, k, v, sinks), (mask,), options)


def modulated_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    kind: Kind = "layer",
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """`kernels_pallas.modulated_norm` of tensors: x (B, T, D); scale, shift (B, D) or (B, T, D) -> (B, T, D).

    Raises:
      ValueError: as the function of arrays; or a tensor is not on JAX's device, or of float64.
      NotImplementedError: the named implementation cannot run these arguments here.
    """
    options = {"kind": kind, "eps": eps, "implementation": implementation}
    return _call(_modulated_norm, (x, scale, shift, weight), (), options)


def expert_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """`kernels_pallas.expert_mlp` of tensors: x (T, D), at k experts a token -> (T, D).

    Args:
      expert_index: integers, (T, k), as torch.topk has them; E is no expert.
      expert_weight: (T, k): what each expert's answer counts; its gradient flows.
      w_gate_up, w_down: (E, D, 2 F), (E, F, D).

    Raises:
      ValueError: as the function of arrays; or a tensor is not on JAX's device, or of float64.
      NotImplementedError: the named implementation cannot run these arguments here.
    """
    if expert_index.ndim != 2 or expert_index.shape != expert_weight.shape or len(expert_index) != len(x):
        raise ValueError(
            f"expert_mlp: expert_index {tuple(expert_index.shape)} and expert_weight {tuple(expert_weight.shape)} "
            f"for {len(x)} tokens; give both as (T, k)."
        )
    options = {"implementation": implementation}
    return _call(_expert_mlp, (x, expert_weight, w_gate_up, w_down), (expert_index.int(),), options)


def to_jax(tensor: Tensor) -> jax.Array:
    """The same memory as an array, a copy where the tensor is not contiguous.

    Raises:
      ValueError: it is not on JAX's device, or of float64, which JAX would round.
    """
    if BACKENDS.get(tensor.device.type) != jax.default_backend():
        raise ValueError(
            f"kernels_pallas.torch: a tensor on {tensor.device}, and JAX runs on {jax.default_backend()}; "
            "move the tensor, or choose with JAX_PLATFORMS=cpu or cuda."
        )
    if tensor.dtype == torch.float64:
        raise ValueError("kernels_pallas.torch: a tensor of float64; kernels take float32 and narrower: cast it.")
    return jnp.from_dlpack(tensor.detach().contiguous())


def _flash_attention(q, k, v, sinks, mask, **options):
    return attention.flash_attention(q, k, v, sinks=sinks, mask=mask, **options)


def _modulated_norm(x, scale, shift, weight, **options):
    return norms.modulated_norm(x, scale, shift, weight=weight, **options)


def _expert_mlp(x, expert_weight, w_gate_up, w_down, expert_index, **options):
    T, k = expert_index.shape
    token = jnp.repeat(jnp.arange(T, dtype=jnp.int32), k)
    flat = (token, expert_index.reshape(-1), expert_weight.reshape(-1).astype(jnp.float32))
    routing = experts.Assignments(*flat, num_tokens=T, num_experts=len(w_down)).route()
    return experts.expert_mlp(x, routing, w_gate_up, w_down, **options)


@torch.compiler.disable
def _call(function: Callable[..., Any], tensors: tuple, constants: tuple, options: dict[str, Any]):
    """function(*tensors, *constants, **options); tensors may be None, constants have no gradient."""
    program = _program(function, tuple(options.items()))
    constants = jax.tree.map(lambda leaf: to_jax(leaf) if isinstance(leaf, torch.Tensor) else leaf, constants)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = _Differentiable.apply(program, constants, *tensors)
    else:
        arrays = tuple(None if t is None else to_jax(t) for t in tensors)
        out = tuple(map(torch.from_dlpack, program.plain(arrays, constants)))
    return out[0] if len(out) == 1 else out


class _Differentiable(torch.autograd.Function):
    """One call that PyTorch will want the gradients of."""

    @staticmethod
    def forward(ctx, program, constants, *tensors):
        """The results; what the backward needs of tensors is saved with PyTorch, for its watch over them."""
        arrays = tuple(None if t is None else to_jax(t) for t in tensors)
        out, residuals = program.forward(arrays, constants)
        results = tuple(map(torch.from_dlpack, out))
        held = jax.tree.leaves((arrays, constants, out))
        watched = [t for t in tensors if t is not None] + [None] * len(jax.tree.leaves(constants)) + list(results)
        used = residuals.plan.used
        ctx.save_for_backward(*(watched[i] for i in used))
        ctx.program, ctx.residuals, ctx.held = program, residuals, [held[i] for i in used]
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_out):
        """The kernel's own backward."""
        _ = ctx.saved_tensors  # raises where one was changed in place
        gradients = ctx.program.backward(ctx.residuals, ctx.held, tuple(map(to_jax, d_out)))
        return None, None, *(None if g is None else torch.from_dlpack(g) for g in gradients)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Where each leaf of a pullback is: its number among those of (arguments, constants, results), or None."""

    places: tuple[int | None, ...]
    tree: Any

    @functools.cached_property
    def used(self) -> list[int]:
        """The numbers, ascending."""
        return sorted({place for place in self.places if place is not None})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What a backward needs beside arguments and results."""

    own: list[jax.Array]
    plan: _Plan = dataclasses.field(metadata={"static": True})


@functools.cache
def _program(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> "_Program":
    return _Program(functools.partial(function, **dict(options)))


class _Program:
    """A function of (arrays, constants) to a tuple, compiled: alone, with what its backward needs, its backward."""

    def __init__(self, function: Callable[..., Any]):
        def plain(arrays, constants):
            return tuple(jax.tree.leaves(function(*arrays, *constants)))

        def forward(arrays, constants):
            out, pullback = jax.vjp(lambda *arrays: plain(arrays, constants), *arrays)
            leaves, tree = jax.tree.flatten(pullback)
            numbers = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((arrays, constants, out)))}
            places = tuple(numbers.get(id(leaf)) for leaf in leaves)
            own = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
            return out, _Residuals(own, _Plan(places, tree))

        def backward(residuals, held, d_out):
            plan, own = residuals.plan, iter(residuals.own)
            known = dict(zip(plan.used, held, strict=True))
            leaves = [next(own) if place is None else known[place] for place in plan.places]
            return jax.tree.unflatten(plan.tree, leaves)(d_out)

        self.plain, self.forward, self.backward = jax.jit(plain), jax.jit(forward), jax.jit(backward)
