"""Attention baselines for `bench`: JAX's default attention, tokamax, and PyTorch's SDPA."""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import backend
from .. import timing


def xla_default_unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """The reason why JAX's default attention cannot run these arguments, or None."""
    del q, k, v, mask, scale
    if softcap is not None or sinks is not None or return_lse:
        return "jax.nn.dot_product_attention has no soft cap, no sinks and no lse"
    return None


def xla_default(q, k, v, dense, blind, *, scale, causal):
    """JAX's default attention: XLA's implementation, in the dtype of the inputs."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    return _blinded(attend(q, k, v, mask=dense, scale=scale, is_causal=causal), blind)


def tokamax_unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """The reason why tokamax cannot run these arguments here, or None."""
    del q, k, v, mask, scale, softcap
    if importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install -e '.[peers]'"
    if sinks is not None or return_lse:
        return "tokamax has no sinks and no lse"
    return None


def tokamax(q, k, v, ranges, dense, blind, *, scale, softcap, causal):
    """tokamax's preferred kernel on a GPU, Mosaic else Triton; on a CPU its XLA implementation.

    tokamax's public function falls back to XLA silently and takes no key ranges, so the kernels are called by name.
    """
    from tokamax._src.ops.attention import api, base  # pyright: ignore[reportMissingImports]

    start, end = (None, None) if ranges is None else ranges
    mask = base.Mask(dense, is_causal=causal, k_start=start, k_end=end)
    refusals = []
    for name in ("mosaic_gpu", "triton") if backend.target().platform == "gpu" else ("xla",):
        try:
            out = api.IMPLEMENTATIONS[name](
                q, k, v, mask=mask, logits_scale=base.AUTO if scale is None else scale, logits_soft_cap=softcap
            )
            return _blinded(out, blind)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(refusals))


def torch_unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse, backend_name: str) -> str | None:
    """The reason why PyTorch's SDPA cannot run these arguments here, or None."""
    del k, v, scale
    if softcap is not None or sinks is not None or return_lse:
        return "PyTorch's SDPA has no soft cap, no sinks and no lse"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"PyTorch's kernels need bfloat16 or float16, got {q.dtype}"
    if backend_name == "FLASH_ATTENTION" and _kind(mask) == "dense":
        return f"PyTorch's flash attention supports only full and causal masks, got a mask of kind {mask.kind!r}"
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch with CUDA, which is not installed"
    if backend.target().platform != "gpu":
        return f"PyTorch is timed on an NVIDIA GPU, got {backend.target().kind}"
    import torch  # pyright: ignore[reportMissingModuleSource]

    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no CUDA device"


def torch_call(
    pass_: str, copies: Sequence[timing.Arrays], *, scale, softcap, return_lse, backend_name: str
) -> timing.Call:
    """PyTorch's scaled_dot_product_attention with one backend; the tensors share memory with JAX's arrays."""
    import torch  # pyright: ignore[reportMissingModuleSource]

    del softcap, return_lse
    mask = copies[0][3]
    sighted, blind = _sighted(mask)
    dense = torch.from_dlpack(_dense(sighted, blind)) if _kind(mask) == "dense" else None
    blind = None if blind is None else torch.from_dlpack(jnp.array(blind[:, :, None, None]))
    attend = functools.partial(
        torch_attention, dense=dense, blind=blind, causal=_kind(mask) == "causal", scale=scale, backend=backend_name
    )
    tensors = [[torch.from_dlpack(jnp.asarray(x)) for x in arrays[:3]] for arrays in copies]
    draw = lambda: torch.from_dlpack(timing.cotangent(copies[0][0]))
    function, arguments = torch_pass(attend, pass_, tensors, [draw() for _ in copies])
    to_jax = lambda out: jax.tree.map(lambda t: jnp.from_dlpack(t.detach().contiguous()), out)
    wait = lambda out: torch.cuda.synchronize() if torch.cuda.is_available() else None
    return timing.Call(function, arguments, wait, to_jax)


def torch_attention(q, k, v, *, dense, blind, causal, scale, backend):
    """SDPA of (B, T, N, H) tensors; the transpositions are views."""
    import torch  # pyright: ignore[reportMissingModuleSource]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    with sdpa_kernel(SDPBackend.__members__[backend]):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=dense,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    out = out.transpose(1, 2)
    return out if blind is None else out.masked_fill(blind, 0)


def torch_pass(attend, pass_: str, inputs, d_outs):
    """(function, its arguments for each copy): one pass of `attend`, with gradients by torch.autograd.grad."""
    import torch  # pyright: ignore[reportMissingModuleSource]

    if pass_ == "forward":
        return torch.no_grad()(attend), [tuple(x) for x in inputs]
    inputs = [tuple(x.detach().requires_grad_() for x in tensors) for tensors in inputs]
    gradients = lambda out, tensors, d_out: torch.autograd.grad(out, tensors, d_out, retain_graph=True)
    if pass_ == "backward":
        outs = [attend(*tensors) for tensors in inputs]
        return gradients, list(zip(outs, inputs, d_outs, strict=True))

    def both(tensors, d_out):
        out = attend(*tensors)
        return out, torch.autograd.grad(out, tensors, d_out)

    return both, list(zip(inputs, d_outs, strict=True))


def xla_default_call(pass_, copies, *, scale, softcap, return_lse) -> timing.Call:
    del softcap, return_lse
    mask = copies[0][3]
    sighted, blind = _sighted(mask)
    dense = _dense(sighted, blind) if _kind(mask) == "dense" else None
    function = functools.partial(xla_default, scale=scale, causal=_kind(mask) == "causal")
    return timing.call(function, pass_, [(*arrays[:3], dense, blind) for arrays in copies])


def tokamax_call(pass_, copies, *, scale, softcap, return_lse) -> timing.Call:
    del return_lse
    mask = copies[0][3]
    sighted, blind = _sighted(mask)
    ranges = dense = None
    if _kind(mask) == "dense":
        # Key ranges let tokamax skip tiles. Private keys can only be expressed by a dense mask in addition.
        ranges = tuple(jnp.asarray(x)[:, None, :] for x in (sighted.start, sighted.end))
        dense = None if mask.k_private is None else _dense(sighted, blind)
    function = functools.partial(tokamax, scale=scale, softcap=softcap, causal=_kind(mask) == "causal")
    return timing.call(function, pass_, [(*arrays[:3], ranges, dense, blind) for arrays in copies])


def _kind(mask) -> str:
    """ "full"; "causal" if the causal flag of other libraries means this mask, which needs T = S; or "dense"."""
    if mask is None or mask.kind == "full":
        return "full"
    return "causal" if mask.kind == "causal" and mask.start.shape[1] == mask.num_keys else "dense"


def _sighted(mask) -> tuple[Any, Any]:
    """(the mask, with one visible key for every query whose key range is empty; which queries those are, (M, T)).

    The second is None if there are no such queries.
    """
    if mask is None:
        return None, None
    start, end = np.asarray(mask.start), np.asarray(mask.end)
    blind = start >= end
    if not blind.any():
        return mask, None
    first = np.zeros_like(start)
    sighted = dataclasses.replace(mask, start=np.where(blind, first, start), end=np.where(blind, first + 1, end))
    return sighted, jnp.asarray(blind)


def _dense(sighted, blind) -> jax.Array:
    """The mask as booleans, (M, 1, T, S). A query without a visible key gets all keys."""
    dense = sighted.dense()[:, None]
    return dense if blind is None else dense | blind[:, None, :, None]


def _blinded(out, blind):
    return out if blind is None else jnp.where(blind[:, :, None, None], 0, out)
