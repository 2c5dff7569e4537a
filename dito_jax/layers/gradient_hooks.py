"""Per-example gradient hooks: per-example gradient norms and factors from one backward pass, for private training.

A layer calls `with_hook` beside every product with a parameter, with the input and the output of the product:

    y = with_hook(self, "kernel", x, x @ self.kernel)

This returns y unchanged if the module has no hook for that parameter. A hook is an array of zeros that the forward pass
does not read; its cotangent is a `HookedGradients`. One backward pass with respect to the hooks, instead of the
parameters, therefore returns the norm of each example's gradient. If the hook was made with room for them it also
returns the two factors of the gradient, which for y = x W is x^T d_y for each example
(https://arxiv.org/abs/2009.03106, https://arxiv.org/abs/2210.00038).

An example is `draws` neighbouring rows of the network's batch (its noise draws, or its images). All rows of an example
lie on one device. The mesh axis "tensor" may split a norm; the partial norms are then summed.
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
class HookedGradients:
    """Per-example gradients of one parameter for B examples; fields that were not requested are None."""

    norm_sq: Any  # float32 (B,): squared norm of each example's gradient, including a bias trained with the kernel
    inputs: Any = None  # (B, draws, ..., *in): inputs of the product
    outputs: Any = None  # (B, draws, ..., *out): gradients of the outputs
    groups: Any = None  # float32 (B, draws, n): expert of each row, or -1; a float because cotangents are floats
    gradient: Any = None  # float32 (B, ...): the per-example gradients of a small parameter


class GradientHook(nnx.Variable):
    """Zeros of the shapes of a `HookedGradients`; the hook of parameter `name` is the attribute `name`_hook."""


_recorder: ContextVar[list[tuple[Any, HookedGradients]] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording_hooks() -> Iterator[list[tuple[Any, HookedGradients]]]:
    """Lists the hooks that a trace reaches: (path of the parameter, shapes of all fields of its HookedGradients)."""
    found: list[tuple[Any, HookedGradients]] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def with_hook(
    module: nnx.Module,
    name: str,
    x: Float[Array, "rows ..."],
    y: Float[Array, "rows ..."],
    *,
    groups: Array | None = None,
) -> Float[Array, "rows ..."]:
    """Returns y = x @ module.<name> (+ module.bias) unchanged, and applies the parameter's hook if there is one.

    `groups` (rows, n) is the index of the expert matrix that each row was multiplied by; a negative index means none.
    The gradient of the bias is included if the hook says that the bias is trained with the kernel.
    """
    hook = getattr(module, f"{name}_hook", None)
    if hook is None:
        return y
    dims = getattr(module, name).get_metadata()["dims"].split()[0 if groups is None else 1 :]
    num_in = (len(dims) - (y.ndim - x.ndim)) // 2
    hooked: HookedGradients = hook.get_value()
    product = _Product(
        hooked.norm_sq.shape[0], hooked.inputs is not None, tuple(dims), num_in, hook.get_metadata()["bias"]
    )
    _record(hook, lambda: product.hooked(x, y, groups, jnp.zeros(product.examples)))
    return _apply_hook(product, y, lax.stop_gradient(x), groups, hooked)


def with_weight_hooks(
    module: nnx.Module, names: tuple[str, ...], gradients: Callable[[Any, Any], tuple], arrays: Any, out: Any
) -> Any:
    """Returns `out`, a function of `arrays` and small parameters, unchanged, and applies the parameters' hooks.

    `gradients(arrays, d_out)` returns the gradient of each parameter for each row, (rows, ...).

    Raises:
      UserError: only some of the parameters are trained.
    """
    hooks: list[Any] = [getattr(module, f"{name}_hook", None) for name in names]
    if None in hooks:
        if hooks.count(None) < len(hooks):
            raise UserError(
                f"train.trainable names some of {', '.join(names)} of one layer, which privacy.backend 'ghost' and "
                "'bookkeeping' train together or not at all: name the others, or take privacy.backend 'microbatch'."
            )
        return out
    hooked = [hook.get_value() for hook in hooks]
    how = gradients, hooked[0].gradient is not None, hooked[0].norm_sq.shape[0]
    for name, hook in zip(names, hooks, strict=True):
        of_one = getattr(module, name).shape
        _record(hook, lambda shape=of_one: HookedGradients(jnp.zeros(how[2]), gradient=jnp.zeros((how[2], *shape))))
    return _weight_hooks(how, out, lax.stop_gradient(arrays), hooked)


def product_gradient(
    hooked: HookedGradients, factor: Float[Array, " B"], dims: tuple[str, ...], num_experts: int
) -> Array:
    """Sum over examples of factor times the gradient of a matrix, or of `num_experts` expert matrices; float32.

    An example with factor 0 contributes nothing, even if its gradient is not finite.
    """
    inner = dims if hooked.groups is None else dims[1:]
    num_in = (len(inner) - (hooked.outputs.ndim - hooked.inputs.ndim)) // 2

    def on_device(x, g, groups, factor):
        last = lambda a, n: a.reshape(a.shape[0], -1, math.prod(a.shape[a.ndim - n :]))
        rows, d_rows = last(x, num_in), last(g, len(inner) - num_in)
        shape = (*x.shape[x.ndim - num_in :], *g.shape[g.ndim - (len(inner) - num_in) :])
        if groups is None:
            rows, d_rows = _same_dtype(rows, d_rows)
            gradient = clip_reduce(rows, d_rows, factor).reshape(shape)
        else:
            experts = groups.astype(jnp.int32).reshape(rows.shape[:2])
            gradient = _of_experts(rows, d_rows, experts, factor, num_experts).reshape(num_experts, *shape)
        return summed(gradient, dims)

    x_dims, g_dims = (("B", *["."] * middle, *of) for middle, of in _with_middle(hooked, inner, num_in))
    specs = (" ".join(x_dims), " ".join(g_dims), "B", "B")
    return on_mesh(on_device, specs, " ".join(dims))(hooked.inputs, hooked.outputs, hooked.groups, factor)


def bias_gradient(hooked: HookedGradients, factor: Float[Array, " B"], shape: tuple[int, ...]) -> Array:
    """Sum over examples of factor times the gradient of the bias that was added to the outputs; float32."""
    d_y = hooked.outputs.astype(jnp.float32).reshape(factor.size, -1, *shape)
    return weighted_sum(jnp.sum(d_y, axis=1), factor)


def weighted_sum(gradient: Float[Array, "B ..."], factor: Float[Array, " B"]) -> Array:
    """sum over b of factor[b] gradient[b]; examples with factor 0 are left out, even if they are not finite."""
    factor = factor.reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.sum(jnp.where(factor == 0, 0, factor * gradient), axis=0)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Static description of a hooked product."""

    examples: int
    keep: bool  # return inputs and output gradients too, not only norms
    dims: tuple[str, ...]  # dimension letters of the matrix
    num_in: int  # how many of `dims` are input dimensions
    bias: bool  # include the gradient of the bias

    def hooked(self, x, g, groups, norm_sq) -> HookedGradients:
        """All fields, from the inputs, the output gradients, the expert indices and the norms."""
        by_example = lambda a: a.reshape(self.examples, -1, *a.shape[1:])
        return HookedGradients(
            norm_sq, by_example(x), by_example(g), None if groups is None else by_example(groups.astype(jnp.float32))
        )

    def norm_sq(self, x, g, groups) -> Float[Array, " B"]:
        """Squared per-example gradient norms; partial norms of inputs or outputs split over "tensor" are summed."""
        inputs, outputs = self.dims[: self.num_in], self.dims[self.num_in :]
        num_in, draws = self.num_in, x.shape[0] // self.examples
        split = [any(sharded_by(dim, "tensor") for dim in dims) for dims in (inputs, outputs)]
        assert not all(split), f"one axis shards inputs and outputs alike: {self.dims}"

        def on_device(x, g, groups):
            flat = lambda a, n: a.reshape(a.shape[0] // draws, -1, math.prod(a.shape[a.ndim - n :]))
            rows, d_rows = _same_dtype(flat(x, num_in), flat(g, len(outputs)))
            groups = None if groups is None else groups.reshape(rows.shape[:2])
            # If the inputs are split, each device has all outputs, and a psum would count the bias once per device.
            total = ghost_norm_sq(rows, d_rows, groups, bias=self.bias and not split[0])
            total = lax.psum(total, "tensor") if any(split) else total
            if self.bias and split[0]:
                total += jnp.sum(jnp.square(jnp.sum(d_rows.astype(jnp.float32), axis=1)), axis=1)
            return total

        x_dims = ("B", *["."] * (x.ndim - 1 - num_in), *_activations(inputs))
        g_dims = ("B", *["."] * (g.ndim - 1 - len(outputs)), *_activations(outputs))
        return on_mesh(on_device, (" ".join(x_dims), " ".join(g_dims), "B"), "B")(x, g, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_hook(product: _Product, y, x, groups, hooked: HookedGradients):
    del product, x, groups, hooked
    return y


def _apply_hook_forward(product, y, x, groups, hooked):
    del product, hooked
    return y, (x, groups)


def _apply_hook_backward(product, residuals, d_y):
    x, groups = residuals
    hooked = product.hooked(x, d_y, groups, product.norm_sq(x, d_y, groups))
    return d_y, jnp.zeros_like(x), None, hooked if product.keep else HookedGradients(hooked.norm_sq)


_apply_hook.defvjp(_apply_hook_forward, _apply_hook_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_hooks(how, out, arrays, hooked):
    del how, arrays, hooked
    return out


def _weight_hooks_forward(how, out, arrays, hooked):
    del how, hooked
    return out, arrays


def _weight_hooks_backward(how, arrays, d_out):
    gradients, keep, examples = how
    found = []
    for gradient in gradients(arrays, d_out):
        # Sum the rows of an example first: the norm is that of the whole per-example gradient.
        by_example = gradient.astype(jnp.float32).reshape(examples, -1, *gradient.shape[1:]).sum(axis=1)
        norm_sq = jnp.sum(jnp.square(by_example), axis=tuple(range(1, by_example.ndim)))
        found.append(HookedGradients(norm_sq, gradient=by_example if keep else None))
    return d_out, jax.tree.map(jnp.zeros_like, arrays), found


_weight_hooks.defvjp(_weight_hooks_forward, _weight_hooks_backward)


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


def _record(hook: GradientHook, hooked: Callable[[], HookedGradients]) -> None:
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((hook.get_metadata()["path"], jax.eval_shape(hooked)))


def _same_dtype(*arrays):
    """The arrays unchanged if they have one dtype, else all in float32."""
    alike = len({a.dtype for a in arrays}) == 1
    return arrays if alike else tuple(a.astype(jnp.float32) for a in arrays)


def _activations(dims: tuple[str, ...]) -> tuple[str, ...]:
    """Dims of an activation with a parameter's dims: "D" and "V" are not sharded, the batch uses their mesh axis."""
    return tuple("." if dim in ("D", "V") else dim for dim in dims)


def _with_middle(hooked: HookedGradients, dims: tuple[str, ...], num_in: int):
    inputs, outputs = _activations(dims[:num_in]), _activations(dims[num_in:])
    return (hooked.inputs.ndim - 1 - len(inputs), inputs), (hooked.outputs.ndim - 1 - len(outputs), outputs)
