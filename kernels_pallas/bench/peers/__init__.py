"""Baselines from other libraries that `bench` measures beside the package's own implementations.

A baseline is only measured; it is never chosen to run an operation. How the comparison is kept fair:
- The same inputs: a baseline gets copies of the inputs, and its result is checked with the same tolerance.
- The same clock: the time of all kernels that it launches in forward, backward, or both (timing.py). PyTorch runs
  eagerly; the host time of PyTorch and of JAX is not counted. If CUPTI cannot be loaded it is counted for both.
- The same layout, (B, T, N, H). PyTorch's SDPA takes (B, N, T, H); it gets transposed views, which its kernels read in
  place.
- The mask in the form that is fastest for the baseline, prepared before the clock starts: no mask, its own causal flag,
  its own key ranges, or else a dense (M, 1, T, S) tensor. Most libraries return NaN or the mean of all values for a
  query that no key is visible to. Such a query gets one visible key, and its output is set to 0 afterwards, at the
  cost of one more elementwise kernel.
- `backward` is the gradient alone, from the residuals of the baseline's own forward: jax.vjp's residuals, or PyTorch's
  retained graph. PyTorch's flash backward uses atomics, so its results vary from run to run.
- No tuning beyond what the library ships. tokamax ships no configurations for an H200.
"""

import dataclasses
import functools
from collections.abc import Callable

from .. import timing
from . import attention, experts, memory, torch


@dataclasses.dataclass(frozen=True)
class Peer:
    """A baseline: an implementation of an op in another library.

    unsupported(*arrays, **static) -> None, or the reason why it cannot run these arguments here
    call(pass_, copies, **static) -> a timing.Call; `copies` is the result of timing.copies
    """

    unsupported: Callable[..., str | None]
    call: Callable[..., timing.Call]
    yardstick: bool = False  # an upper bound on speed: as much work as the op, with another result


def _of_experts(of_product: Callable, dense: Callable) -> dict[str, Peer]:
    peers = {name: Peer(_reason(name), experts.call(of_product(f))) for name, f in experts.PRODUCTS.items()}
    return peers | {"dense": Peer(experts.no_reason, experts.call(dense), yardstick=True)}


def _reason(name: str) -> Callable[..., str | None]:
    return experts.tokamax_unsupported if name.startswith("tokamax") else experts.no_reason


def _torch(backend_name: str) -> Peer:
    return Peer(
        functools.partial(attention.torch_unsupported, backend_name=backend_name),
        functools.partial(attention.torch_call, backend_name=backend_name),
    )


def _jax(function: Callable, *, yardstick: bool = False) -> Peer:
    """A baseline written as a differentiable JAX function of arrays and options."""
    reason = memory.tokamax_unsupported if function.__name__.startswith("tokamax") else memory.no_reason
    run = lambda pass_, copies, **static: timing.call(functools.partial(function, **static), pass_, copies)
    return Peer(reason, run, yardstick)


def _compiled(name: str) -> Peer:
    return Peer(torch.unsupported, functools.partial(torch.call, name))


PEERS: dict[str, dict[str, Peer]] = {
    "flash_attention": {
        "xla_default": Peer(attention.xla_default_unsupported, attention.xla_default_call),
        "tokamax": Peer(attention.tokamax_unsupported, attention.tokamax_call),
        "torch_cudnn": _torch("CUDNN_ATTENTION"),
        "torch_flash": _torch("FLASH_ATTENTION"),
    },
    "grouped_matmul": _of_experts(lambda product: product, experts.dense),
    "expert_mlp": _of_experts(lambda product: functools.partial(experts.mlp, product=product), experts.dense_mlp),
    "modulated_norm": {"tokamax": _jax(memory.tokamax_norm), "torch_compile": _compiled("modulated_norm")},
    "gated_residual_norm": {
        "tokamax": _jax(memory.tokamax_residual_norm),
        "torch_compile": _compiled("gated_residual_norm"),
    },
    "qk_norm_rope": {"torch_compile": _compiled("qk_norm_rope")},
    "gated_mlp": {
        "xla_default": _jax(memory.default_gated_mlp),
        "products": _jax(memory.gated_products, yardstick=True),
        "tokamax": _jax(memory.tokamax_mlp),
        "torch_compile": _compiled("gated_mlp"),
    },
    "dense_mlp": {
        "xla_default": _jax(memory.default_dense_mlp),
        "products": _jax(memory.dense_products, yardstick=True),
        "torch_compile": _compiled("dense_mlp"),
    },
    "linear_cross_entropy": {
        "xla_default": _jax(memory.default_loss),
        "torch_compile": _compiled("linear_cross_entropy"),
    },
}
