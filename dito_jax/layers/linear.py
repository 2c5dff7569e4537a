"""Dense projections whose parameters know their dims."""

from collections.abc import Sequence

from flax import nnx
from jax.nn.initializers import Initializer, xavier_uniform, zeros
from jaxtyping import Array, Float

from dito_jax.layers.taps import observed


class Linear(nnx.LinearGeneral):
    """flax's, seen by private training."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return observed(self, "kernel", x, super().__call__(x), bias=self.bias is not None)


def linear(
    shape_in: int | Sequence[int],
    shape_out: int | Sequence[int],
    dims: str,
    *,
    init: Initializer = xavier_uniform(),  # noqa: B008 (a pure function)
    bias: bool = True,
    rngs: nnx.Rngs,
) -> Linear:
    """y = x @ kernel + bias, or without one, over the last dims of x; `dims` names those of the kernel, inputs first.

    The initialiser sees the kernel as one matrix (all inputs x all outputs), biases start at zero: DiT's rule.
    """
    shape_in = (shape_in,) if isinstance(shape_in, int) else tuple(shape_in)
    shape_out = (shape_out,) if isinstance(shape_out, int) else tuple(shape_out)
    return Linear(
        shape_in,
        shape_out,
        axis=tuple(range(-len(shape_in), 0)),
        kernel_init=init,
        use_bias=bias,
        bias_init=zeros,
        rngs=rngs,
        kernel_metadata={"dims": dims},
        bias_metadata={"dims": " ".join(dims.split()[len(shape_in) :])},
    )
