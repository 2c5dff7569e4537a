"""What private training sees of a parameter: what met it, and the gradient of what came out, for each example apart.

A layer says beside every product with a parameter what went in and what came out:

    y = observed(self, "kernel", x, x @ self.kernel)

which is y, and nothing more, unless the module has a tap for that parameter. A tap is zeros that nothing reads; its
cotangent is what was `Seen`. So one backward pass, with respect to taps and not to parameters, has the norm of each
example's gradient, and where the tap has room for them the factors of which the gradient is the product: for
y = x W it is x^T d_y, an example at a time (https://arxiv.org/abs/2009.03106, https://arxiv.org/abs/2210.00038).

An example has `draws` neighbouring rows of the network's batch (its noise draws, or its images), rows of one example
lie on one device, and every norm is whole there but for what the mesh axis "tensor" divides.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dito_jax.errors import UserError
from dito_jax.sharding import on_mesh, sharded_by, summed
from kernels_pallas import clip_reduce, ghost_norm_sq, grouped_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Of one parameter: what a backward pass says of B examples; None what nobody asked for, or there is not."""

    norm_sq: Any  # float32 (B,): the squared norm of each example's gradient, with that of a bias trained beside it
    inputs: Any = None  # (B, draws, ..., *in)
    outputs: Any = None  # (B, draws, ..., *out): gradients of the outputs
    groups: Any = None  # float32 (B, draws, n): the expert of each row, or -1; a float, for a cotangent is one
    gradient: Any = None  # float32 (B, ...): each example's gradient itself, of a small parameter


class Tap(nnx.Variable):
    """Room for what is `Seen` of the parameter whose name it bears, with "_tap" after it."""


_recorder: ContextVar[list[tuple[Any, Seen]] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[Any, Seen]]]:
    """The taps that a trace comes by, by the path they were given, each with the shapes of all that it could see."""
    found: list[tuple[Any, Seen]] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def observed(
    module: nnx.Module,
    name: str,
    x: Float[Array, "rows ..."],
    y: Float[Array, "rows ..."],
    *,
    groups: Array | None = None,
) -> Float[Array, "rows ..."]:
    """y = x @ module.<name> (+ module.bias), seen; `groups` (rows, n) says which of several matrices each row has met.

    Rows of a negative group have met none. A bias counts where the tap says that it is trained with the kernel.
    """
    tap = getattr(module, f"{name}_tap", None)
    if tap is None:
        return y
    dims = getattr(module, name).get_metadata()["dims"].split()[0 if groups is None else 1 :]
    num_in = (len(dims) - (y.ndim - x.ndim)) // 2
    seen: Seen = tap.get_value()
    product = _Product(seen.norm_sq.shape[0], seen.inputs is not None, tuple(dims), num_in, tap.get_metadata()["bias"])
    _record(tap, lambda: product.seen(x, y, groups, jnp.zeros(product.examples)))
    return _observe(product, y, lax.stop_gradient(x), groups, seen)


def observed_weights(
    module: nnx.Module, names: tuple[str, ...], gradients: Callable[[Any, Any], tuple], arrays: Any, out: Any
) -> Any:
    """`out`, made of `arrays` and small parameters; gradients(arrays, d_out) has those of each example, (rows, ...)."""
    taps: list[Any] = [getattr(module, f"{name}_tap", None) for name in names]
    if None in taps:
        if taps.count(None) < len(taps):
            raise UserError(
                f"train.trainable names some of {', '.join(names)} of one layer, which privacy.backend 'ghost' and "
                "'bookkeeping' train together or not at all: name the others, or take privacy.backend 'microbatch'."
            )
        return out
    seen = [tap.get_value() for tap in taps]
    how = gradients, seen[0].gradient is not None, seen[0].norm_sq.shape[0]
    for name, tap in zip(names, taps, strict=True):
        of_one = getattr(module, name).shape
        _record(tap, lambda shape=of_one: Seen(jnp.zeros(how[2]), gradient=jnp.zeros((how[2], *shape))))
    return _observe_weights(how, out, lax.stop_gradient(arrays), seen)


def product_gradient(seen: Seen, factor: Float[Array, " B"], dims: tuple[str, ...], num_experts: int) -> Array:
    """The sum of the examples' gradients of a matrix, or of so many experts', each times its factor; float32.

    An example of factor 0 adds nothing, whatever was seen of it.
    """
    inner = dims if seen.groups is None else dims[1:]
    num_in = (len(inner) - (seen.outputs.ndim - seen.inputs.ndim)) // 2

    def on_device(x, g, groups, factor):
        last = lambda a, n: a.reshape(a.shape[0], -1, math.prod(a.shape[a.ndim - n :]))
        rows, d_rows = last(x, num_in), last(g, len(inner) - num_in)
        shape = (*x.shape[x.ndim - num_in :], *g.shape[g.ndim - (len(inner) - num_in) :])
        if groups is None:
            rows, d_rows = _alike(rows, d_rows)
            gradient = clip_reduce(rows, d_rows, factor).reshape(shape)
        else:
            experts = groups.astype(jnp.int32).reshape(rows.shape[:2])
            gradient = _of_experts(rows, d_rows, experts, factor, num_experts).reshape(num_experts, *shape)
        return summed(gradient, dims)

    x_dims, g_dims = (("B", *["."] * middle, *of) for middle, of in _with_middle(seen, inner, num_in))
    specs = (" ".join(x_dims), " ".join(g_dims), "B", "B")
    return on_mesh(on_device, specs, " ".join(dims))(seen.inputs, seen.outputs, seen.groups, factor)


def bias_gradient(seen: Seen, factor: Float[Array, " B"], shape: tuple[int, ...]) -> Array:
    """The same of the bias that was added to the outputs; float32."""
    d_y = seen.outputs.astype(jnp.float32).reshape(factor.size, -1, *shape)
    return weighted_sum(jnp.sum(d_y, axis=1), factor)


def weighted_sum(gradient: Float[Array, "B ..."], factor: Float[Array, " B"]) -> Array:
    """sum over b of factor[b] gradient[b], without what has factor 0."""
    factor = factor.reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.sum(jnp.where(factor == 0, 0, factor * gradient), axis=0)


@dataclasses.dataclass(frozen=True)
class _Product:
    """How a product is to be looked at."""

    examples: int
    keep: bool  # inputs and outputs, beside the norms
    dims: tuple[str, ...]  # of the matrix
    num_in: int  # how many of them are the inputs'
    bias: bool

    def seen(self, x, g, groups, norm_sq) -> Seen:
        """All there is to see."""
        by_example = lambda a: a.reshape(self.examples, -1, *a.shape[1:])
        return Seen(
            norm_sq, by_example(x), by_example(g), None if groups is None else by_example(groups.astype(jnp.float32))
        )

    def norm_sq(self, x, g, groups) -> Float[Array, " B"]:
        """Squared norms of the examples' gradients. Each device has its share of inputs or outputs: shares add up."""
        inputs, outputs = self.dims[: self.num_in], self.dims[self.num_in :]
        num_in, draws = self.num_in, x.shape[0] // self.examples
        split = [any(sharded_by(dim, "tensor") for dim in dims) for dims in (inputs, outputs)]
        assert not all(split), f"one axis shards inputs and outputs alike: {self.dims}"

        def on_device(x, g, groups):
            flat = lambda a, n: a.reshape(a.shape[0] // draws, -1, math.prod(a.shape[a.ndim - n :]))
            rows, d_rows = _alike(flat(x, num_in), flat(g, len(outputs)))
            groups = None if groups is None else groups.reshape(rows.shape[:2])
            # Where inputs are divided each device has all outputs: the bias would be counted as often.
            total = ghost_norm_sq(rows, d_rows, groups, bias=self.bias and not split[0])
            total = lax.psum(total, "tensor") if any(split) else total
            if self.bias and split[0]:
                total += jnp.sum(jnp.square(jnp.sum(d_rows.astype(jnp.float32), axis=1)), axis=1)
            return total

        x_dims = ("B", *["."] * (x.ndim - 1 - num_in), *_activations(inputs))
        g_dims = ("B", *["."] * (g.ndim - 1 - len(outputs)), *_activations(outputs))
        return on_mesh(on_device, (" ".join(x_dims), " ".join(g_dims), "B"), "B")(x, g, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(product: _Product, y, x, groups, seen: Seen):
    del product, x, groups, seen
    return y


def _observe_forward(product, y, x, groups, seen):
    del product, seen
    return y, (x, groups)


def _observe_backward(product, residuals, d_y):
    x, groups = residuals
    seen = product.seen(x, d_y, groups, product.norm_sq(x, d_y, groups))
    return d_y, jnp.zeros_like(x), None, seen if product.keep else Seen(seen.norm_sq)


_observe.defvjp(_observe_forward, _observe_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe_weights(how, out, arrays, seen):
    del how, arrays, seen
    return out


def _observe_weights_forward(how, out, arrays, seen):
    del how, seen
    return out, arrays


def _observe_weights_backward(how, arrays, d_out):
    gradients, keep, examples = how
    found = []
    for gradient in gradients(arrays, d_out):
        # Rows of an example add up to its gradient before anything is squared.
        by_example = gradient.astype(jnp.float32).reshape(examples, -1, *gradient.shape[1:]).sum(axis=1)
        norm_sq = jnp.sum(jnp.square(by_example), axis=tuple(range(1, by_example.ndim)))
        found.append(Seen(norm_sq, gradient=by_example if keep else None))
    return d_out, jax.tree.map(jnp.zeros_like, arrays), found


_observe_weights.defvjp(_observe_weights_forward, _observe_weights_backward)


def _of_experts(rows, d_rows, experts, factor, num_experts: int):
    """sum over the rows r of each expert of factor[r] rows[r]^T d_rows[r], (E, D, F); float32."""
    counts = (experts >= 0) & (factor != 0)[:, None]
    d_rows = jnp.where(counts[..., None], factor[:, None, None] * d_rows.astype(jnp.float32), 0)
    rows = jnp.where(counts[..., None], rows, 0).astype(jnp.float32)
    experts = jnp.where(counts, experts, num_experts).reshape(-1)
    order = jnp.argsort(experts, stable=True)
    rows, d_rows = (a.reshape(-1, a.shape[-1])[order] for a in (rows, d_rows))
    sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    weights = jnp.zeros((num_experts, rows.shape[1], d_rows.shape[1]), jnp.float32)
    return jax.vjp(lambda w: grouped_matmul(rows, w, sizes), weights)[1](d_rows)[0]


def _record(tap: Tap, seen: Callable[[], Seen]) -> None:
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((tap.get_metadata()["path"], jax.eval_shape(seen)))


def _alike(*arrays):
    """Arrays of one dtype: as they are, or float32."""
    alike = len({a.dtype for a in arrays}) == 1
    return arrays if alike else tuple(a.astype(jnp.float32) for a in arrays)


def _activations(dims: tuple[str, ...]) -> tuple[str, ...]:
    """What shards an activation of a parameter's dims: its width is whole where the batch has the axis."""
    return tuple("." if dim in ("D", "V") else dim for dim in dims)


def _with_middle(seen: Seen, dims: tuple[str, ...], num_in: int):
    inputs, outputs = _activations(dims[:num_in]), _activations(dims[num_in:])
    return (seen.inputs.ndim - 1 - len(inputs), inputs), (seen.outputs.ndim - 1 - len(outputs), outputs)
