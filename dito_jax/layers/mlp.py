"""Feed-forward layers: the GELU MLP of the original DiT and the SwiGLU of modern transformers.

XLA computes the matrix products, unless `implementation` names a kernel of `kernels_pallas.gated_mlp` or `dense_mlp`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.linear import linear
from dito_jax.sharding import axis_size, on_mesh
from kernels_pallas import dense_mlp, gated_mlp


class GeluMLP(nnx.Module):
    """W2 gelu_tanh(W1 x) with biases; the hidden width is 4 D."""

    def __init__(self, width: int, *, implementation: str | None = None, rngs: nnx.Rngs):
        self.implementation = implementation
        self.up = linear(width, self.hidden(width), "D F", rngs=rngs)
        self.down = linear(self.hidden(width), width, "F D", rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.implementation is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=True))

        def mlp(x, w_up, b_up, w_down):  # the output bias is added after the psum over "tensor", once
            none = jnp.zeros(x.shape[-1], x.dtype)
            return dense_mlp(x, w_up, b_up, w_down, none, implementation=self.implementation)

        assert self.up.bias is not None and self.down.bias is not None
        weights = (self.up.kernel[...], self.up.bias[...], self.down.kernel[...])
        return _on_mesh(mlp, (". F", "F", "F ."))(x, *weights) + self.down.bias[...].astype(x.dtype)

    @staticmethod
    def hidden(width: int) -> int:
        """Feed-forward width F."""
        return 4 * width

    @staticmethod
    def flops(width: int) -> int:
        """FLOPs per token of the two matrix products."""
        return 2 * 2 * width * GeluMLP.hidden(width)


class SwiGLU(nnx.Module):
    """W3 (silu(W1 x) * W2 x) without biases (arXiv 2002.05202 eq. 6), with hidden width `hidden`.

    The default hidden width gives about as many parameters as GeluMLP.
    """

    def __init__(self, width: int, hidden: int | None = None, *, implementation: str | None = None, rngs: nnx.Rngs):
        self.implementation = implementation
        hidden = self.hidden(width) if hidden is None else hidden
        self.gate_up = linear(width, (2, hidden), "D . F", bias=False, rngs=rngs)
        self.down = linear(hidden, width, "F D", bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.implementation is None:
            both = self.gate_up(x)
            return self.down(jax.nn.silu(both[..., 0, :]) * both[..., 1, :])
        mlp = functools.partial(gated_mlp, implementation=self.implementation)
        return _on_mesh(mlp, (". . F", "F ."))(x, self.gate_up.kernel[...], self.down.kernel[...])

    @staticmethod
    def hidden(width: int) -> int:
        """Feed-forward width F: 2/3 of 4 D, rounded up to a multiple of 16 for the tiles of GPU kernels."""
        return -(-8 * width // 3 // 16) * 16

    @staticmethod
    def flops(width: int) -> int:
        """FLOPs per token of the three matrix products."""
        return 3 * 2 * width * SwiGLU.hidden(width)


def _on_mesh(mlp: Callable, dims: tuple[str, ...]) -> Callable:
    """`mlp(x, *weights)` with F sharded over the mesh axis "tensor" and the outputs summed over it."""

    def on_one_device(x, *weights):
        y = mlp(x, *weights)
        return jax.lax.psum(y, "tensor") if axis_size("tensor") > 1 else y

    return on_mesh(on_one_device, ("B T .", *dims), "B T .")
