"""A network with taps: each example's gradient, seen in one backward pass, without a gradient of its own size.

Guarantees
  - Every parameter asked for is seen exactly once, or there is an error that names it: a norm that lacks a parameter,
    or counts a shared one without its cross terms, would be too small, and clipping by it no clipping.
  - Norms of example i are made of rows of example i alone. That the network keeps examples apart is not checked here:
    `coupling.py` refuses those that do not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.gradient_hooks import Seen, Tap, bias_gradient, product_gradient, recording, weighted_sum
from dito_jax.layers.moe import RouterBias


Path = tuple[Any, ...]
Trainable = Callable[[Path, nnx.Variable], bool]


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A network's structure with taps, and the zeros in them."""

    graph: nnx.GraphDef
    taps: nnx.State

    def norm_sq(self, seen: nnx.State) -> Float[Array, " B"]:
        """The squared norm of each example's whole gradient."""
        return jnp.sum(jnp.concatenate([_by_layer(of_one.norm_sq) for of_one in _all_seen(seen).values()]), axis=0)

    def gradient(self, seen: nnx.State, factor: Float[Array, " B"], params: nnx.State) -> nnx.State:
        """The sum of the examples' gradients, each times its factor, float32: a state as `params`, trainable ones."""
        by_path = _all_seen(seen)

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


def tapped(
    graph: nnx.GraphDef,
    params: nnx.State,
    trainable: Trainable,
    losses: Callable[[nnx.Module], Array],
    examples: int,
    *,
    keep: bool,
) -> Tapped:
    """Taps for the trainable parameters of a network that computes `examples`; with `keep` they have room for factors.

    `losses` runs the network once, abstractly, to find what each tap will see.

    Raises:
      ValueError: a trainable parameter is used more than once, or where no tap sees it.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    wanted, with_bias = _tappable(nnx.merge(graph, shapes), trainable)
    layers = {path: variable.shape[0] if _stacked(variable) else None for path, variable in wanted.items()}
    of_norms = {path: Seen(jax.ShapeDtypeStruct((examples,), jnp.float32)) for path in wanted}
    probe, taps = _with_taps(graph, shapes, of_norms, layers, with_bias)
    with recording() as found:
        jax.eval_shape(lambda params, taps: losses(nnx.merge(probe, params, taps)), shapes, taps)
    paths = [path for path, _ in found]
    for path in wanted:
        if paths.count(path) != 1:
            name = ".".join(map(str, path))
            raise ValueError(
                f"private training sees {name} {paths.count(path)} times in the network; wanted once. Take the "
                "backend 'microbatch', freeze it, or compute it by the plain definition (model.kernels.mlp None)."
            )
    seen = dict(found) if keep else of_norms
    graph, taps = _with_taps(graph, shapes, seen, layers, with_bias)
    return Tapped(graph, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), taps))


def _tappable(model: nnx.Module, trainable: Trainable) -> tuple[dict[Path, nnx.Variable], set[Path]]:
    """The parameters that get a tap: those with a gradient, but for a bias whose kernel has one; and those kernels."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if not isinstance(variable, RouterBias) and trainable(path, variable):
            found[path] = variable
    biases = {path for path in found if path[-1] == "bias" and _kernel(path) in found}
    return {path: found[path] for path in found if path not in biases}, set(map(_kernel, biases))


def _with_taps(graph, shapes, seen: dict[Path, Seen], layers: dict[Path, int | None], with_bias: set[Path]):
    model = nnx.merge(graph, shapes)
    modules = dict(nnx.iter_modules(model))
    for path, of_one in seen.items():
        count = layers[path]
        stack = lambda a, n=count: a if n is None else jax.ShapeDtypeStruct((n, *a.shape), a.dtype)
        tap = Tap(jax.tree.map(stack, of_one), path=path, bias=path in with_bias)
        setattr(modules[path[:-1]], f"{path[-1]}_tap", tap)
    graph, _, taps = nnx.split(model, nnx.Param, Tap)
    return graph, taps


def _gradient(seen: Seen, factor, dims, shape) -> Array:
    if seen.gradient is not None:
        return weighted_sum(seen.gradient, factor)
    num_experts = 0 if seen.groups is None else shape[0]
    return product_gradient(seen, factor, dims, num_experts).reshape(shape)


def _all_seen(seen: nnx.State) -> dict[Path, Seen]:
    """What was seen, by the path of the parameter."""
    return {tap.get_metadata()["path"]: tap.get_value() for _, tap in nnx.to_flat_state(seen)}


def _by_layer(norm_sq: Array) -> Array:
    return norm_sq if norm_sq.ndim == 2 else norm_sq[None]


def _kernel(path: Path) -> Path:
    return (*path[:-1], "kernel")


def _stacked(variable: nnx.Variable) -> bool:
    return variable.ndim > len(variable.get_metadata()["dims"].split())


def _map_variables(function: Callable[[Path, nnx.Variable], nnx.Variable], state: nnx.State) -> nnx.State:
    return nnx.from_flat_state([(path, function(path, variable)) for path, variable in nnx.to_flat_state(state)])
