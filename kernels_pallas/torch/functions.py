"""PyTorch bindings of the operations: `from kernels_pallas import torch as kernels` (needs PyTorch).

Tensors and JAX arrays share memory via DLPack, on a GPU and on a CPU. Gradients are computed by the kernels' own
backward passes. PyTorch's autograd holds the residuals of the backward; arguments and results among them are not
copied. So PyTorch frees residuals as usual, activation checkpointing and offloading work, and a backward after an
in-place change of a residual is an error.

Both libraries allocate memory of the same GPU: set XLA_PYTHON_CLIENT_PREALLOCATE=false before the first call. Each call
waits for PyTorch's current stream, and that stream waits for the call: use one stream throughout. Other JAX work in the
process does not wait for that stream. It may reuse the memory of a result that PyTorch has released while a PyTorch
kernel still reads it: synchronise before such work. A call is compiled once for each new shape; torch.compile skips it
(graph break). There are no forward-mode derivatives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingModuleSource]
from torch import Tensor  # pyright: ignore[reportMissingModuleSource]

from .. import attention, backend, experts, norms
from ..norms.api import Kind
from .dlpack import from_dlpack


BACKENDS = {"cpu": "cpu", "cuda": "gpu"}  # PyTorch's device type: JAX's platform
ALIGN = 16  # bytes: the widest load of the kernels


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
    """`kernels_pallas.flash_attention` for tensors: q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H),
    and with return_lse also the log-sum-exp (B, T, N), float32.

    The vectors of the mask are JAX or NumPy arrays; `to_jax` converts tensors. NumPy arrays are copied to the device at
    each call; a single jax.device_put(mask) avoids that. In-place changes of the mask are not detected: do not change
    it before the backward.

    Raises:
      ValueError: as `kernels_pallas.flash_attention`; or a tensor is not on JAX's device, or has dtype float64.
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
    """`kernels_pallas.modulated_norm` for tensors: x (B, T, D); scale, shift (B, D) or (B, T, D) -> (B, T, D).

    Raises:
      ValueError: as `kernels_pallas.modulated_norm`; or a tensor is not on JAX's device, or has dtype float64.
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
    """`kernels_pallas.expert_mlp` for tensors: x (T, D), with k experts per token -> (T, D).

    Args:
      expert_index: integers, (T, k), for example from torch.topk; the value E means no expert.
      expert_weight: (T, k): the weight of each expert's output; it has a gradient.
      w_gate_up, w_down: (E, D, 2 F), (E, F, D).

    Raises:
      ValueError: as `kernels_pallas.expert_mlp`; or a tensor is not on JAX's device, or has dtype float64.
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
    """The tensor as a JAX array that shares its memory; a copy if it is not contiguous or not 16-byte aligned.

    64-bit integers become 32-bit integers, JAX's default. An in-place change of the tensor changes the array.

    Raises:
      ValueError: the tensor is not on JAX's device, or has dtype float64, which JAX would round.
    """
    (array,) = from_dlpack([_shareable(tensor)])
    return array


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
    """function(*tensors, *constants, **options). A tensor may be None; constants have no gradient."""
    if torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError("kernels_pallas.torch: no forward-mode derivatives; use backward, or PyTorch's own.")
    wanted = tuple(i for i, t in enumerate(tensors) if t is not None and t.requires_grad)
    wanted = wanted if torch.is_grad_enabled() else ()
    program = _program(function, tuple(options.items()), wanted, backend.interpret())
    constants = jax.tree.map(functools.partial(_constant, tensors[0].device), constants)
    out = _Differentiable.apply(program, constants, *tensors) if wanted else program.plain_of(tensors, constants)
    return out[0] if len(out) == 1 else out


def _constant(device, leaf):
    """A JAX array for `_call`. NumPy arrays become tensors first, so that PyTorch's stream orders the copy."""
    leaf = torch.as_tensor(leaf, device=device) if isinstance(leaf, np.ndarray) else leaf
    return to_jax(leaf) if isinstance(leaf, Tensor) else leaf


def _arrays(tensors: tuple) -> tuple:
    """The tensors as arrays, None for None. Copies are made before the single wait for PyTorch's stream."""
    arrays = iter(from_dlpack([_shareable(t) for t in tensors if t is not None]))
    return tuple(None if t is None else next(arrays) for t in tensors)


def _shareable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous and aligned copy of it, whose memory JAX can share."""
    if BACKENDS.get(tensor.device.type) != jax.default_backend():
        raise ValueError(
            f"kernels_pallas.torch: a tensor is on {tensor.device}, but JAX runs on {jax.default_backend()}; "
            "move the tensor, or set JAX_PLATFORMS=cpu or cuda."
        )
    if tensor.dtype == torch.float64:
        raise ValueError("kernels_pallas.torch: got a float64 tensor; cast it to float32 or a narrower dtype.")
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGN else tensor


class _Differentiable(torch.autograd.Function):
    """The autograd function of one call."""

    @staticmethod
    def forward(ctx, program, constants, *tensors):
        """The results; the residuals of the backward are saved with PyTorch's autograd."""
        out, residuals = program.forward(_arrays(tensors), constants)
        results = tuple(map(torch.from_dlpack, out))
        leaves = [*(t for t in tensors if t is not None), *jax.tree.leaves(constants), *results]
        needed = [*(leaves[i] for i in residuals.plan.used), *map(torch.from_dlpack, residuals.own)]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in needed))
        ctx.constants = [None if isinstance(x, Tensor) else x for x in needed]
        ctx.program, ctx.plan, ctx.num_tensors = program, residuals.plan, len(tensors)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_out):
        """The kernel's own backward."""
        saved = ctx.saved_tensors  # raises if one was changed in place
        arrays = _arrays((*saved, *d_out))
        needed = [a if c is None else c for a, c in zip(arrays[: len(saved)], ctx.constants, strict=True)]
        held, own = needed[: len(ctx.plan.used)], needed[len(ctx.plan.used) :]
        found = ctx.program.backward(_Residuals(own, ctx.plan), held, arrays[len(saved) :])
        gradients = dict(zip(ctx.program.wanted, map(torch.from_dlpack, found), strict=True))
        return None, None, *(gradients.get(i) for i in range(ctx.num_tensors))


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """For each leaf of a pullback its index among the leaves of (arguments, constants, results), or None."""

    places: tuple[int | None, ...]
    tree: Any

    @functools.cached_property
    def used(self) -> list[int]:
        """The indices that occur, ascending."""
        return sorted({place for place in self.places if place is not None})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """The residuals of a backward that are neither arguments nor results."""

    own: list[jax.Array]
    plan: _Plan = dataclasses.field(metadata={"static": True})


@functools.cache
def _program(function: Callable[..., Any], options: tuple, wanted: tuple[int, ...], interpret: bool) -> "_Program":
    del interpret  # part of the cache key: interpret mode traces another program
    return _Program(functools.partial(function, **dict(options)), wanted)


class _Program:
    """Three compiled forms of a function of (arrays, constants): alone, with residuals, and its backward.

    `wanted` are the indices of the arrays that have gradients.
    """

    def __init__(self, function: Callable[..., Any], wanted: tuple[int, ...]):
        def plain(arrays, constants):
            return tuple(jax.tree.leaves(function(*arrays, *constants)))

        def forward(arrays, constants):
            def of_wanted(*those):
                new = dict(zip(wanted, those, strict=True))
                return plain([new.get(i, array) for i, array in enumerate(arrays)], constants)

            out, pullback = jax.vjp(of_wanted, *(arrays[i] for i in wanted))
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

        self.wanted = wanted
        self.plain, self.forward, self.backward = jax.jit(plain), jax.jit(forward), jax.jit(backward)

    def plain_of(self, tensors: tuple, constants: tuple) -> tuple:
        """The results without residuals, as tensors."""
        return tuple(map(torch.from_dlpack, self.plain(_arrays(tensors), constants)))
