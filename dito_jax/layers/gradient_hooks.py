"""Per-example gradient hooks: per-example gradient norms and factors from one backward pass, for private training.

A layer calls `with_hook` beside every product with a parameter, with the input and the output of the product:

    y = with_hook(self, "kernel", x, x @ self.kernel)

This returns y unchanged if the module has no hook for that parameter. A hook is a pytree that the forward pass does not
read, and its cotangent is what `RETURNS` lists. One backward pass with respect to the hooks, instead of the parameters,
therefore returns the norm of each example's gradient; or the two factors of the gradient, which for y = x W is x^T d_y
for each example (https://arxiv.org/abs/2009.03106, https://arxiv.org/abs/2210.00038); or the clipped sum of the
gradients, accumulated over the examples in float32.

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
from dito_jax.layers.hooked_gradients import (
    HookedGradients,
    activation_dims,
    bias_gradient,
    product_gradient,
    same_dtype,
    weighted_sum,
)
from dito_jax.sharding import on_mesh, sharded_by
from kernels_pallas import ghost_norm_sq


RETURNS = (
    "uses",  # float32 (): how often the network uses the parameter; for `ghost_clipping.check_uses`
    "norms",  # HookedGradients with norm_sq alone
    "factors",  # HookedGradients with all fields
    "sum",  # ClippedGradient
)
ROUNDING = 2.0**-15  # of a sum of the squares of a small parameter's gradient, at most, relative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedGradient:
    """As a hook: the factor of each of B examples, and zeros. As its cotangent: the sums of factor times gradient."""

    factor: Any  # float32 (B,); its cotangent is zero
    gradient: Any  # float32, of the parameter's shape
    bias: Any = None  # float32, of the bias's shape, if it is trained with the kernel


class GradientHook(nnx.Variable):
    """The hook of parameter `name` is the attribute `name`_hook.

    Metadata: `path` of the parameter, `examples` B, `returns` one of RETURNS, `bias` whether the bias counts too.
    """


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
    through: Any = None,
) -> Float[Array, "rows ..."]:
    """Returns y = x @ module.<name> (+ module.bias) unchanged, and applies the parameter's hook if there is one.

    `groups` (rows, n) is the index of the expert matrix that each row was multiplied by; a negative index means none.
    The gradient of the bias is included if the hook says that the bias is trained with the kernel. `through` is what y
    was computed from beside the parameter, if that is not x.
    """
    hook = getattr(module, f"{name}_hook", None)
    if hook is None:
        return y
    dims = tuple(getattr(module, name).get_metadata()["dims"].split())
    expert, dims = (dims[:0], dims) if groups is None else (dims[:1], dims[1:])
    num_in = (len(dims) - (y.ndim - x.ndim)) // 2
    about, value = hook.get_metadata(), hook.get_value()
    sums = (value.gradient, value.bias) if about["returns"] == "sum" else ()
    shapes = tuple(None if a is None else a.shape for a in sums)
    product = _Product(about["examples"], about["returns"], expert, dims, num_in, about["bias"], shapes)
    if product.returns == "uses":
        y = severed(lax.stop_gradient(y), x if through is None else through)
        _record(hook, lambda: product.hooked(x, y, groups, jnp.zeros(product.examples)))
    return _apply_hook(product, y, lax.stop_gradient(x), groups, value)


def with_weight_hooks(
    module: nnx.Module,
    names: tuple[str, ...],
    gradients: Callable[[Any, Any], tuple],
    arrays: Any,
    out: Any,
    *,
    through: Any,
) -> Any:
    """Returns `out`, a function of `through` and small parameters, unchanged, and applies the parameters' hooks.

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
    about = hooks[0].get_metadata()
    how = gradients, about["returns"], about["examples"]
    if about["returns"] == "uses":
        out = severed(lax.stop_gradient(out), through)
        for name, hook in zip(names, hooks, strict=True):
            of_one = (about["examples"], *getattr(module, name).shape)
            _record(hook, lambda shape=of_one: HookedGradients(jnp.zeros(shape[0]), gradient=jnp.zeros(shape)))
    return _weight_hooks(how, out, lax.stop_gradient(arrays), [hook.get_value() for hook in hooks])


@jax.custom_vjp
def severed(y: Any, through: Any) -> Any:
    """y, whose gradient reaches nothing but `through`; what it is there does not matter, as only uses are counted."""
    del through
    return y


def _severed_backward(through, d_y):
    reached = sum(jnp.sum(d, dtype=jnp.float32) for d in jax.tree.leaves(d_y))
    return None, jax.tree.map(lambda a: jnp.full(a.shape, reached, a.dtype), through)


severed.defvjp(lambda y, through: (y, through), _severed_backward)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Static description of a hooked product."""

    examples: int
    returns: str  # one of RETURNS
    expert: tuple[str, ...]  # dimension letter of the experts, if there are several matrices
    dims: tuple[str, ...]  # dimension letters of the matrix
    num_in: int  # how many of `dims` are input dimensions
    bias: bool  # include the gradient of the bias
    shapes: tuple  # of the parameter and of the bias that is trained with it, for the sum

    def hooked(self, x, g, groups, norm_sq) -> HookedGradients:
        """All fields, from the inputs, the output gradients, the expert indices and the norms."""
        by_example = lambda a: a.reshape(self.examples, -1, *a.shape[1:])
        return HookedGradients(
            norm_sq, by_example(x), by_example(g), None if groups is None else by_example(groups.astype(jnp.float32))
        )

    def cotangent(self, x, g, groups, factor) -> Any:
        """What `returns` says, from the inputs, the output gradients, the expert indices and the clipping factors."""
        if self.returns == "uses":
            return jnp.ones((), jnp.float32)
        if self.returns != "sum":
            hooked = self.hooked(x, g, groups, self.norm_sq(x, g, groups))
            return hooked if self.returns == "factors" else HookedGradients(hooked.norm_sq)
        hooked, (shape, of_bias) = self.hooked(x, g, groups, None), self.shapes
        dims, num_experts = (*self.expert, *self.dims), shape[0] if self.expert else 0
        gradient = product_gradient(hooked, factor, dims, num_experts).reshape(shape)
        bias = None if of_bias is None else bias_gradient(hooked, factor, of_bias)
        return ClippedGradient(jnp.zeros_like(factor), gradient, bias)

    def norm_sq(self, x, g, groups) -> Float[Array, " B"]:
        """Upper bounds of squared per-example gradient norms; those of parts split over "tensor" are summed."""
        inputs, outputs = self.dims[: self.num_in], self.dims[self.num_in :]
        num_in, draws = self.num_in, x.shape[0] // self.examples
        split = [any(sharded_by(dim, "tensor") for dim in dims) for dims in (inputs, outputs)]
        assert not all(split), f"one axis shards inputs and outputs alike: {self.dims}"

        def on_device(x, g, groups):
            flat = lambda a, n: a.reshape(a.shape[0] // draws, -1, math.prod(a.shape[a.ndim - n :]))
            rows, d_rows = same_dtype(flat(x, num_in), flat(g, len(outputs)))
            groups = None if groups is None else groups.reshape(rows.shape[:2])
            # If the inputs are split, each device has all outputs, and a psum would count the bias once per device.
            _, total = ghost_norm_sq(rows, d_rows, groups, bias=self.bias and not split[0])
            total = lax.psum(total, "tensor") if any(split) else total
            if self.bias and split[0]:
                total += ghost_norm_sq(jnp.ones_like(rows[..., :1]), d_rows)[1]
            return total

        x_dims = ("B", *["."] * (x.ndim - 1 - num_in), *activation_dims(inputs))
        g_dims = ("B", *["."] * (g.ndim - 1 - len(outputs)), *activation_dims(outputs))
        return on_mesh(on_device, (" ".join(x_dims), " ".join(g_dims), "B"), "B")(x, g, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_hook(product: _Product, y, x, groups, hook):
    del product, x, groups, hook
    return y


def _apply_hook_forward(product, y, x, groups, hook):
    # Of the hook only the factors are kept: a scan over layers would keep its zeros for every layer.
    return y, (x, groups, hook.factor if product.returns == "sum" else None)


def _apply_hook_backward(product, residuals, d_y):
    x, groups, factor = residuals
    return d_y, jnp.zeros_like(x), None, product.cotangent(x, d_y, groups, factor)


_apply_hook.defvjp(_apply_hook_forward, _apply_hook_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_hooks(how, out, arrays, hooks):
    del how, arrays, hooks
    return out


def _weight_hooks_forward(how, out, arrays, hooks):
    _, returns, _ = how
    return out, (arrays, [hook.factor if returns == "sum" else None for hook in hooks])


def _weight_hooks_backward(how, residuals, d_out):
    (gradients, returns, examples), (arrays, factors), found = how, residuals, []
    for factor, gradient in zip(factors, gradients(arrays, d_out), strict=True):
        # Sum the rows of an example first: the norm is that of the whole per-example gradient.
        by_example = gradient.astype(jnp.float32).reshape(examples, -1, *gradient.shape[1:]).sum(axis=1)
        if returns == "uses":
            found.append(jnp.ones((), jnp.float32))
        elif returns == "sum":
            found.append(ClippedGradient(jnp.zeros_like(factor), weighted_sum(by_example, factor)))
        else:
            norm_sq = (1 + ROUNDING) * jnp.sum(jnp.square(by_example), axis=tuple(range(1, by_example.ndim)))
            found.append(HookedGradients(norm_sq, gradient=by_example if returns == "factors" else None))
    return d_out, jax.tree.map(jnp.zeros_like, arrays), found


_weight_hooks.defvjp(_weight_hooks_forward, _weight_hooks_backward)


def _record(hook: GradientHook, hooked: Callable[[], HookedGradients]) -> None:
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((hook.get_metadata()["path"], jax.eval_shape(hooked)))
