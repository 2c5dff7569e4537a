"""torch.compile baselines for `bench`: norms, rotary embeddings, MLPs and the loss as PyTorch users write them.

Each function takes the arrays of the op as tensors, in the op's order. torch is imported when a function is called.
peers/__init__.py describes how the comparison is kept fair.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ... import backend
from .. import timing


def unsupported(*arrays, **static) -> str | None:
    """The reason why torch.compile cannot run here, or None."""
    del arrays, static
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch with CUDA, which is not installed"
    if backend.target().platform != "gpu":
        return f"PyTorch is timed on an NVIDIA GPU, got {backend.target().kind}"
    import torch  # pyright: ignore[reportMissingModuleSource]

    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no CUDA device"


def modulated_norm(x, scale, shift, weight, *, kind, eps):
    """As the op's reference, computed in float32."""
    y = x.float()
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.float()
    if scale is not None:
        y = y * (1 + _by_token(scale))
    return (y if shift is None else y + _by_token(shift)).to(x.dtype)


def gated_residual_norm(x, branch, gate, scale, shift, weight, *, kind, eps):
    """The residual sum, then its norm."""
    x_new = (x.float() + _by_token(gate) * branch.float()).to(x.dtype)
    return x_new, modulated_norm(x_new, scale, shift, weight, kind=kind, eps=eps)


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, *, interleaved, eps):
    """q and k normalised and rotated; v is copied to a contiguous tensor, which attention needs."""
    import torch  # pyright: ignore[reportMissingModuleSource]

    def prepared(x, weight):
        y = x.float()
        if weight is not None:
            y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
        if cos is not None:
            a, b = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
            c, s = cos[:, :, None], sin[:, :, None]
            turned = (a * c - b * s, b * c + a * s)
            y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return y.to(x.dtype)

    q = qkv[..., :-2, :].flatten(2, 3)
    return prepared(q, q_weight), prepared(qkv[..., -2, :], k_weight), qkv[..., -1, :].contiguous()


def gated_mlp(x, w_gate_up, w_down, *, activation):
    """Two products with the gated activation between them."""
    gate, up = (x @ w_gate_up.flatten(1)).chunk(2, -1)
    return (_activated(gate, activation) * up) @ w_down


def dense_mlp(x, w_up, b_up, w_down, b_down, *, activation):
    """Two products with bias and activation between them."""
    return _activated(x @ w_up + b_up, activation) @ w_down + b_down


def linear_cross_entropy(x, w, labels, *, ignore_index, z_loss, logit_softcap):
    """Cross-entropy from materialised logits: the product in the dtype of x, the loss in float32."""
    import torch  # pyright: ignore[reportMissingModuleSource]

    logits = (x @ w).float()
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    lse = logits.logsumexp(-1)
    counts = labels != ignore_index
    of_label = logits.gather(1, torch.where(counts, labels, 0).long()[:, None])[:, 0]
    return torch.where(counts, lse - of_label + z_loss * lse.square(), 0.0), lse


FUNCTIONS = {f.__name__: f for f in (modulated_norm, gated_residual_norm, qk_norm_rope, gated_mlp, dense_mlp,
                                     linear_cross_entropy)}  # fmt: skip
CONSTANT = {"qk_norm_rope": (3, 4)}  # floating-point leaves that have no gradient


def call(name: str, pass_: str, copies: Sequence[timing.Arrays], *, compiled: bool = True, **static) -> timing.Call:
    """One pass of one of FUNCTIONS with torch.compile; the tensors share memory with JAX's arrays.

    There is a gradient for every floating-point array, in the order of the op's leaves; that of a constant is zero.
    """
    import torch  # pyright: ignore[reportMissingModuleSource]

    function = functools.partial(FUNCTIONS[name], **static)
    function = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
    tensors: list[list[Any]] = [[_tensor(leaf) for leaf in _leaves(name, arrays)] for arrays in copies]
    constants = CONSTANT.get(name, ())
    wanted = [i for i, leaf in enumerate(tensors[0]) if leaf is not None and leaf.is_floating_point()]

    def forward(*leaves):
        out = function(*leaves)
        return out if isinstance(out, tuple) else (out,)

    def gradients(out, leaves, d_out):
        inputs = [leaves[i] for i in wanted if i not in constants]
        found = iter(torch.autograd.grad(out, inputs, d_out, retain_graph=True))
        return [torch.zeros_like(leaves[i]) if i in constants else next(found) for i in wanted]

    def both(leaves, d_out):
        out = forward(*leaves)
        return out, gradients(out, leaves, d_out)

    shapes = [
        jax.ShapeDtypeStruct(tuple(o.shape), _tensor_to_jax(o).dtype) for o in torch.no_grad()(forward)(*tensors[0])
    ]
    draw = lambda: tuple(torch.from_dlpack(d) for d in timing.cotangent(shapes))
    if pass_ != "forward":
        tensors = [[leaf.detach().requires_grad_(i not in constants) if i in wanted else leaf
                    for i, leaf in enumerate(leaves)] for leaves in tensors]  # fmt: skip
    prepared: dict[str, tuple[Callable[..., Any], Any]] = {
        "forward": (torch.no_grad()(forward), lambda leaves: tuple(leaves)),
        "backward": (gradients, lambda leaves: (forward(*leaves), leaves, draw())),
        "both": (both, lambda leaves: (leaves, draw())),
    }
    run, arguments = prepared[pass_]
    to_jax = lambda out: jax.tree.map(_tensor_to_jax, out)
    wait = lambda out: torch.cuda.synchronize() if torch.cuda.is_available() else None
    return timing.Call(run, [arguments(leaves) for leaves in tensors], wait, to_jax)


def _leaves(name: str, arrays) -> list:
    """The leaves of the arguments: None for an omitted array, and two tables for a rotation."""
    if name == "qk_norm_rope":
        *front, rotation = arrays
        return [*front, *((None, None) if rotation is None else (rotation.cos, rotation.sin))]
    return list(arrays)


def _tensor(leaf):
    import torch  # pyright: ignore[reportMissingModuleSource]

    return None if leaf is None else torch.from_dlpack(jnp.asarray(leaf))


def _tensor_to_jax(tensor):
    return jnp.from_dlpack(tensor.detach().contiguous())


def _by_token(modulation):
    wide = modulation.float()
    return wide if wide.ndim == 3 else wide[:, None]


def _activated(x, activation: str):
    import torch  # pyright: ignore[reportMissingModuleSource]

    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")
