"""Ghost clipping: per-example gradient norms from one backward pass, by hooks at the parameters of a network.

Guarantees
  - Every trainable parameter has a hook that the network uses exactly once, or there is an error that names it. A norm
    that lacks a parameter, or that counts a shared parameter without its cross terms, would be too small, and clipping
    by it would not bound the gradient.
  - The norm of example i is computed from rows of example i only. Whether the network mixes examples is not checked
    here: `coupling.py` refuses configs that do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.gradient_hooks import (
    GradientHook,
    HookedGradients,
    bias_gradient,
    product_gradient,
    recording_hooks,
    weighted_sum,
)
from dito_jax.layers.moe import RouterBias


Path = tuple[Any, ...]
Trainable = Callable[[Path, nnx.Variable], bool]


@dataclasses.dataclass(frozen=True)
class HookedNetwork:
    """The graph of a network with gradient hooks, and the state of the hooks (zeros)."""

    graph: nnx.GraphDef
    hooks: nnx.State

    def norm_sq(self, hooked: nnx.State) -> Float[Array, " B"]:
        """Squared norm of each example's gradient over all hooked parameters."""
        return jnp.sum(jnp.concatenate([_by_layer(of_one.norm_sq) for of_one in _by_path(hooked).values()]), axis=0)

    def gradient(self, hooked: nnx.State, factor: Float[Array, " B"], params: nnx.State) -> nnx.State:
        """Sum over examples of factor times gradient, float32, with the structure of `params` (the trainable ones)."""
        by_path = _by_path(hooked)

        def of_param(path: Path, variable: nnx.Variable) -> nnx.Variable:
            if isinstance(variable, RouterBias):
                return variable.replace(jnp.zeros(variable.shape, jnp.float32))
            dims = tuple(variable.get_metadata()["dims"].split())
            stacked = variable.ndim > len(dims)
            shape = variable.shape[1:] if stacked else variable.shape
            if path in by_path:
                of_layer = lambda s: _gradient(s, factor, dims, shape)
                source = by_path[path]
            else:
                of_layer = lambda s: bias_gradient(s, factor, shape)
                source = by_path[_kernel(path)]
            return variable.replace(jax.lax.map(of_layer, source) if stacked else of_layer(source))

        return _map_variables(of_param, params)


def add_hooks(
    graph: nnx.GraphDef,
    params: nnx.State,
    trainable: Trainable,
    losses: Callable[[nnx.Module], Array],
    examples: int,
    *,
    keep: bool,
) -> HookedNetwork:
    """Adds hooks for the trainable parameters of a network, for `examples` examples.

    With `keep` the hooks return inputs and output gradients too, not only norms. `losses` is traced once to find the
    shapes of every hook.

    Raises:
      ValueError: the network uses the hook of a trainable parameter more than once, or never.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    wanted, with_bias = _hookable(nnx.merge(graph, shapes), trainable)
    layers = {path: variable.shape[0] if _stacked(variable) else None for path, variable in wanted.items()}
    of_norms = {path: HookedGradients(jax.ShapeDtypeStruct((examples,), jnp.float32)) for path in wanted}
    probe, hooks = _with_hooks(graph, shapes, of_norms, layers, with_bias)
    with recording_hooks() as found:
        jax.eval_shape(lambda params, hooks: losses(nnx.merge(probe, params, hooks)), shapes, hooks)
    paths = [path for path, _ in found]
    for path in wanted:
        if paths.count(path) != 1:
            name = ".".join(map(str, path))
            raise ValueError(
                f"private training: the network uses the gradient hook of {name} {paths.count(path)} times; wanted "
                "once. Set privacy.backend to 'microbatch', freeze the parameter, or set model.kernels.mlp to None."
            )
    hooked = dict(found) if keep else of_norms
    graph, hooks = _with_hooks(graph, shapes, hooked, layers, with_bias)
    return HookedNetwork(graph, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), hooks))


def _hookable(model: nnx.Module, trainable: Trainable) -> tuple[dict[Path, nnx.Variable], set[Path]]:
    """(the parameters that get their own hook, the kernels whose hook includes their bias)."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if not isinstance(variable, RouterBias) and trainable(path, variable):
            found[path] = variable
    biases = {path for path in found if path[-1] == "bias" and _kernel(path) in found}
    return {path: found[path] for path in found if path not in biases}, set(map(_kernel, biases))


def _with_hooks(
    graph, shapes, hooked: dict[Path, HookedGradients], layers: dict[Path, int | None], with_bias: set[Path]
):
    model = nnx.merge(graph, shapes)
    modules = dict(nnx.iter_modules(model))
    for path, of_one in hooked.items():
        count = layers[path]
        stack = lambda a, n=count: a if n is None else jax.ShapeDtypeStruct((n, *a.shape), a.dtype)
        hook = GradientHook(jax.tree.map(stack, of_one), path=path, bias=path in with_bias)
        setattr(modules[path[:-1]], f"{path[-1]}_hook", hook)
    graph, _, hooks = nnx.split(model, nnx.Param, GradientHook)
    return graph, hooks


def _gradient(hooked: HookedGradients, factor, dims, shape) -> Array:
    if hooked.gradient is not None:
        return weighted_sum(hooked.gradient, factor)
    num_experts = 0 if hooked.groups is None else shape[0]
    return product_gradient(hooked, factor, dims, num_experts).reshape(shape)


def _by_path(hooked: nnx.State) -> dict[Path, HookedGradients]:
    """The HookedGradients of each parameter, by its path."""
    return {hook.get_metadata()["path"]: hook.get_value() for _, hook in nnx.to_flat_state(hooked)}


def _by_layer(norm_sq: Array) -> Array:
    return norm_sq if norm_sq.ndim == 2 else norm_sq[None]


def _kernel(path: Path) -> Path:
    return (*path[:-1], "kernel")


def _stacked(variable: nnx.Variable) -> bool:
    return variable.ndim > len(variable.get_metadata()["dims"].split())


def _map_variables(function: Callable[[Path, nnx.Variable], nnx.Variable], state: nnx.State) -> nnx.State:
    return nnx.from_flat_state([(path, function(path, variable)) for path, variable in nnx.to_flat_state(state)])
