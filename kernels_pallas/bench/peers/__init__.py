"""Other people's implementations of our ops, for `bench` to time beside ours; nothing here is ever chosen.

What makes the comparison fair:
- The same numbers. A peer gets copies of the very inputs, and its answer is held to the same tolerance.
- The same clock: the time of all kernels that it launches, forward, backward, or both (timing.py). PyTorch runs
  eagerly, and its host's work counts as little as JAX's; where CUPTI cannot be loaded it does count, for both.
- The same layout, (B, T, N, H). PyTorch's SDPA takes (B, N, T, H): it gets transposed views, which its kernels read
  as they are.
- The mask in the form that suits the peer, made before the clock starts: none, or its own causal flag, or its own
  ranges of keys, or else the dense (M, 1, T, S) tensor. Most give a query that sees nothing NaN or a mean of all
  values; such a query gets a key to see, and its output is set to 0 afterwards, one elementwise kernel more.
- `backward` is the gradient alone, from what the peer's own forward kept: jax.vjp's residuals, or PyTorch's graph,
  retained. PyTorch's flash backward adds with atomics, and two of its runs differ; ours does not.
- As its users have it: no tuning for these cases beyond what it ships. tokamax ships none for an H200.
"""

import dataclasses
import functools
from collections.abc import Callable

from .. import timing
from . import attention, experts, memory, torch


@dataclasses.dataclass(frozen=True)
class Peer:
    """Somebody else's op.

    unsupported(*arrays, **static) -> None, or why these arguments cannot run here
    call(pass_, copies, **static) -> what `timing` takes; `copies` as of timing.copies
    """

    unsupported: Callable[..., str | None]
    call: Callable[..., timing.Call]
    yardstick: bool = False  # as much work, and another answer


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
    """A function of arrays and options that JAX can differentiate."""
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
