"""A network with taps: each example's gradient, seen in one backward pass, without a gradient of its own size.

Guarantees
  - Every parameter asked for is seen exactly once, or there is an error that names it: a norm that lacks a parameter,
    or counts a shared one without its cross terms, would be too small, and clipping by it no clipping.
  - Norms of example i are made of rows of example i alone. That the network keeps examples apart is not checked here:
    `coupling.py` refuses those that do not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.errors import UserError
from dito_jax.layers.moe import RouterBias
from dito_jax.layers.taps import Seen, Tap, bias_gradient, product_gradient, recording, weighted_sum


Path = tuple[Any, ...]
Trainable = Callable[[Path, nnx.Variable], bool]


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A network's structure with taps, and the zeros in them.

    A bias is seen by the tap of the kernel beside it. `lone` are those whose kernel is frozen, by the kernel's path.
    """

    graph: nnx.GraphDef
    taps: nnx.State
    lone: dict[Path, nnx.Variable]

    def norm_sq(self, seen: nnx.State) -> Float[Array, " B"]:
        """The squared norm of each example's whole gradient."""
        norms = [
            _bias_norm_sq(of_one, self.lone[path]) if path in self.lone else of_one.norm_sq
            for path, of_one in _all_seen(seen).items()
        ]
        return jnp.sum(jnp.concatenate([_by_layer(norm_sq) for norm_sq in norms]), axis=0)

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

    Those of lone biases have it always: their norms are made of the outputs' gradients. `losses` runs the network
    once, abstractly, to find what each tap will see.

    Raises:
      ValueError: a trainable parameter is used more than once, or where no tap sees it.
      UserError: a kernel is trained and the bias beside it is not.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    wanted, lone = _tappable(nnx.merge(graph, shapes), trainable)
    layers = {path: variable.shape[0] if _stacked(variable) else None for path, variable in wanted.items()}
    of_norms = {path: Seen(jax.ShapeDtypeStruct((examples,), jnp.float32)) for path in wanted}
    probe, taps = _with_taps(graph, shapes, of_norms, layers)
    with recording() as found:
        jax.eval_shape(lambda params, taps: losses(nnx.merge(probe, params, taps)), shapes, taps)
    paths = [path for path, _ in found]
    for path in wanted:
        if paths.count(path) != 1:
            name = _name(_bias(path) if path in lone else path)
            raise ValueError(
                f"private training sees {name} {paths.count(path)} times in the network; wanted once. Take the "
                "backend 'microbatch', freeze it, or compute it by the plain definition (model.kernels.mlp None)."
            )
    seen = {path: of_one if keep or path in lone else of_norms[path] for path, of_one in found}
    graph, taps = _with_taps(graph, shapes, seen, layers)
    return Tapped(graph, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), taps), lone)


def _tappable(model: nnx.Module, trainable: Trainable) -> tuple[dict[Path, nnx.Variable], dict[Path, nnx.Variable]]:
    """The parameters that get a tap, which are those with a gradient but for a bias beside a kernel; lone biases."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {path: variable for path, variable in flat if not isinstance(variable, RouterBias)}
    trained = {path: variable for path, variable in params.items() if trainable(path, variable)}
    found, lone = {}, {}
    for path, variable in trained.items():
        kernel, bias = _kernel(path), _bias(path)
        if path == kernel and bias in params and bias not in trained:
            raise UserError(
                f"train.trainable trains {_name(path)} and freezes {_name(bias)}; privacy.backend 'ghost' and "
                "'bookkeeping' want the two alike. Train both, or take privacy.backend 'microbatch'."
            )
        if path == bias and kernel in params:
            found[kernel] = params[kernel]
            if kernel not in trained:
                lone[kernel] = variable
        else:
            found[path] = variable
    return found, lone


def _with_taps(graph, shapes, seen: dict[Path, Seen], layers: dict[Path, int | None]):
    model = nnx.merge(graph, shapes)
    modules = dict(nnx.iter_modules(model))
    for path, of_one in seen.items():
        count = layers[path]
        stack = lambda a, n=count: a if n is None else jax.ShapeDtypeStruct((n, *a.shape), a.dtype)
        setattr(modules[path[:-1]], f"{path[-1]}_tap", Tap(jax.tree.map(stack, of_one), path=path))
    graph, _, taps = nnx.split(model, nnx.Param, Tap)
    return graph, taps


def _gradient(seen: Seen, factor, dims, shape) -> Array:
    if seen.gradient is not None:
        return weighted_sum(seen.gradient, factor)
    num_experts = 0 if seen.groups is None else shape[0]
    return product_gradient(seen, factor, dims, num_experts).reshape(shape)


def _bias_norm_sq(seen: Seen, bias: nnx.Variable) -> Array:
    """The squared norm of each example's gradient of a bias, which is the outputs' added up over its rows."""
    of_layer = bias.shape[1:] if _stacked(bias) else bias.shape
    d_y = seen.outputs.astype(jnp.float32).reshape(*seen.norm_sq.shape, -1, math.prod(of_layer))
    return jnp.sum(jnp.square(jnp.sum(d_y, axis=-2)), axis=-1)


def _all_seen(seen: nnx.State) -> dict[Path, Seen]:
    """What was seen, by the path of the parameter."""
    return {tap.get_metadata()["path"]: tap.get_value() for _, tap in nnx.to_flat_state(seen)}


def _by_layer(norm_sq: Array) -> Array:
    return norm_sq if norm_sq.ndim == 2 else norm_sq[None]


def _kernel(path: Path) -> Path:
    return (*path[:-1], "kernel")


def _bias(path: Path) -> Path:
    return (*path[:-1], "bias")


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _stacked(variable: nnx.Variable) -> bool:
    return variable.ndim > len(variable.get_metadata()["dims"].split())


def _map_variables(function: Callable[[Path, nnx.Variable], nnx.Variable], state: nnx.State) -> nnx.State:
    return nnx.from_flat_state([(path, function(path, variable)) for path, variable in nnx.to_flat_state(state)])
