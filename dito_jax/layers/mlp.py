"""Feed-forward layers: the original DiT's and the gated one of modern transformers."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.linear import linear


class GeluMLP(nnx.Module):
    """W2 gelu_tanh(W1 x), four times the width inside."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = linear(width, self.hidden(width), "D F", rngs=rngs)
        self.down = linear(self.hidden(width), width, "F D", rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))

    @staticmethod
    def hidden(width: int) -> int:
        """Feed-forward width F."""
        return 4 * width

    @staticmethod
    def flops(width: int) -> int:
        """Of one token: two products."""
        return 2 * 2 * width * GeluMLP.hidden(width)


class SwiGLU(nnx.Module):
    """W3 (silu(W1 x) * W2 x), without biases (arXiv 2002.05202 eq. 6): three matrices, `hidden` wide inside.

    Where that is left out there are as many parameters as in GeluMLP.
    """

    def __init__(self, width: int, hidden: int | None = None, *, rngs: nnx.Rngs):
        hidden = self.hidden(width) if hidden is None else hidden
        self.gate_up = linear(width, (2, hidden), "D . F", bias=False, rngs=rngs)
        self.down = linear(hidden, width, "F D", bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        both = self.gate_up(x)
        return self.down(jax.nn.silu(both[..., 0, :]) * both[..., 1, :])

    @staticmethod
    def hidden(width: int) -> int:
        """Feed-forward width F: two thirds of 4 D, up to the next multiple of 16 that a GPU's tiles want."""
        return -(-8 * width // 3 // 16) * 16

    @staticmethod
    def flops(width: int) -> int:
        """Of one token: three products."""
        return 3 * 2 * width * SwiGLU.hidden(width)
