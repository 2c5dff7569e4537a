"""Ghost clipping: per-example gradient norms from one backward pass, by hooks at the parameters of a network.

Guarantees
  - The network uses every trainable parameter exactly once, by its hook, or there is an error that names it. A norm
    that lacks a use of a parameter, or the cross terms between two uses, would be too small, and clipping by it would
    not bound the gradient. Uses are counted by differentiation: a parameter that `lax.scan` applies n times counts n.
  - The norm of example i is computed from rows of example i only. Whether the network mixes examples is not checked
    here: `coupling.py` refuses configs that do.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxtyping import Array, Float

from dito_jax.layers.gradient_hooks import ClippedGradient, GradientHook, recording_hooks
from dito_jax.layers.hooked_gradients import HookedGradients, bias_gradient, product_gradient, weighted_sum
from dito_jax.layers.moe import RouterBias


Path = tuple[Any, ...]
Trainable = Callable[[Path, nnx.Variable], bool]
Losses = Callable[[nnx.Module, Any], Array]  # (network, examples) -> the loss of each example
OPAQUE = Primitive("opaque")
OPAQUE.multiple_results = True
CURE = "Set privacy.backend to 'microbatch', freeze the parameter, or set model.kernels.mlp to None."


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The places of a network that take gradient hooks, for `examples` examples."""

    graph: nnx.GraphDef
    shapes: nnx.State  # of all parameters
    examples: int
    wanted: dict[Path, nnx.Variable]  # the parameters that have a hook of their own
    with_bias: set[Path]  # those of `wanted` whose hook counts the bias too
    factors: dict[Path, HookedGradients]  # shapes of all fields; empty before the network is traced

    def attached(self, returns: str, factor: Array | None = None) -> tuple[nnx.GraphDef, nnx.State]:
        """(the network's graph with hooks that return what gradient_hooks.RETURNS lists, the state of the hooks).

        `factor` (B,) is the clipping factor of each example, for hooks that return the sum.
        """
        model = nnx.merge(self.graph, self.shapes)
        modules = dict(nnx.iter_modules(model))
        for path, variable in self.wanted.items():
            about: dict[str, Any] = dict(
                path=path, examples=self.examples, returns=returns, bias=path in self.with_bias
            )
            hook = GradientHook(self._hook(path, variable, returns, factor), **about)
            setattr(modules[path[:-1]], f"{path[-1]}_hook", hook)
        graph, _, hooks = nnx.split(model, nnx.Param, GradientHook)
        return graph, hooks

    def _hook(self, path: Path, variable: nnx.Variable, returns: str, factor: Array | None) -> Any:
        layers = variable.shape[:1] if _stacked(variable) else ()
        zeros = lambda a: jnp.zeros((*layers, *a.shape), a.dtype)
        if returns == "uses":
            return jnp.zeros(layers)
        if returns == "sum":
            assert factor is not None
            bias = self._bias(path) if path in self.with_bias else None
            by_layer = jnp.broadcast_to(factor, (*layers, self.examples))
            return ClippedGradient(by_layer, _zeros(variable), None if bias is None else _zeros(bias))
        norms = HookedGradients(jax.ShapeDtypeStruct((self.examples,), jnp.float32))
        return jax.tree.map(zeros, self.factors[path] if returns == "factors" else norms)

    def _bias(self, path: Path) -> nnx.Variable:
        return dict(nnx.to_flat_state(self.shapes))[(*path[:-1], "bias")]

    def norm_sq(self, hooked: nnx.State) -> Float[Array, " B"]:
        """Squared norm of each example's gradient over all hooked parameters."""
        return jnp.sum(jnp.concatenate([_by_layer(of_one.norm_sq) for of_one in _by_path(hooked).values()]), axis=0)

    def summed(self, hooked: nnx.State, params: nnx.State) -> nnx.State:
        """What hooks that return the sum returned, float32, with the structure of `params` (the trainable ones)."""
        by_path = _by_path(hooked)

        def of_param(path: Path, variable: nnx.Variable) -> nnx.Variable:
            if isinstance(variable, RouterBias):
                return variable.replace(jnp.zeros(variable.shape, jnp.float32))
            return variable.replace(by_path[path].gradient if path in by_path else by_path[_kernel(path)].bias)

        return _map_variables(of_param, params)

    def gradient(self, hooked: nnx.State, factor: Float[Array, " B"], params: nnx.State) -> nnx.State:
        """Sum over examples of factor times gradient, float32, from what hooks that return the factors returned."""
        by_path = _by_path(hooked)

        def of_param(path: Path, variable: nnx.Variable) -> nnx.Variable:
            if isinstance(variable, RouterBias):
                return variable.replace(jnp.zeros(variable.shape, jnp.float32))
            dims = tuple(variable.get_metadata()["dims"].split())
            shape = variable.shape[1:] if _stacked(variable) else variable.shape
            if path in by_path:
                of_layer = lambda s: _gradient(s, factor, dims, shape)
                source = by_path[path]
            else:
                of_layer = lambda s: bias_gradient(s, factor, shape)
                source = by_path[_kernel(path)]
            return variable.replace(jax.lax.map(of_layer, source) if _stacked(variable) else of_layer(source))

        return _map_variables(of_param, params)


def find_hooks(
    graph: nnx.GraphDef, params: nnx.State, trainable: Trainable, losses: Losses, rows: Any, examples: int
) -> Hooks:
    """The hooks of the trainable parameters of a network, for `examples` examples.

    `losses(network, rows)` is differentiated once, abstractly, to count the uses of every parameter.

    Raises:
      ValueError: the network does not use a trainable parameter exactly once by its hook.
    """
    shapes, rows = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree) for tree in (params, rows))
    wanted, with_bias = _hookable(nnx.merge(graph, shapes), trainable)
    hooks = Hooks(graph, shapes, examples, wanted, with_bias, {})
    return dataclasses.replace(hooks, factors=check_uses(hooks, losses, rows))


def check_uses(hooks: Hooks, losses: Losses, rows: Any) -> dict[Path, HookedGradients]:
    """The shapes of the HookedGradients of each parameter with a hook; an error if a parameter is not used once.

    A hook that returns uses has the cotangent 1, so the gradient with respect to it is the number of times that the
    network uses it. The same hooks let no gradient reach their parameter. What reaches it nevertheless is a use beside
    the hook. Both gradients are constants unless something is wrong: what they depend on is seen in their program.
    """
    graph, zeros = hooks.attached("uses")

    def gradients(params, zeros, rows):
        loss, pull = jax.vjp(lambda p, h: losses(nnx.merge(graph, p, h), rows), params, zeros)
        return [[leaf.get_value() for _, leaf in nnx.to_flat_state(state)] for state in pull(jnp.ones_like(loss))]

    with recording_hooks() as recorded:
        program = jax.make_jaxpr(gradients)(hooks.shapes, zeros, rows)
    program = _without_effects(program)
    found = dict(recorded)
    if unused := [path for path in hooks.wanted if path not in found]:
        raise ValueError(_misused(unused[0], "the gradient hook of {} 0 times; wanted once"))
    params = [path for path, _ in nnx.to_flat_state(hooks.shapes)]
    hooked = {*hooks.wanted, *((*path[:-1], "bias") for path in hooks.with_bias)}
    for place, path in enumerate(params):
        if path in hooked and ((beside := _constant(program, place)) is None or np.any(beside)):
            raise ValueError(_misused(path, "{} beside its gradient hook too; wanted there alone"))
    for place, (_, hook) in enumerate(nnx.to_flat_state(zeros), start=len(params)):
        if (uses := _constant(program, place)) is None or np.any(uses > 1):
            times = "a number of times that depends on the data" if uses is None else f"{int(np.max(uses))} times"
            raise ValueError(_misused(hook.get_metadata()["path"], f"the gradient hook of {{}} {times}; wanted once"))
    return found


def _hookable(model: nnx.Module, trainable: Trainable) -> tuple[dict[Path, nnx.Variable], set[Path]]:
    """(the parameters that get their own hook, the kernels whose hook includes their bias)."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if not isinstance(variable, RouterBias) and trainable(path, variable):
            found[path] = variable
    biases = {path for path in found if path[-1] == "bias" and _kernel(path) in found}
    return {path: found[path] for path in found if path not in biases}, set(map(_kernel, biases))


def _constant(program, place: int) -> np.ndarray | None:
    """The value of one output of a program; None if it depends on the inputs."""
    wanted = [i == place for i in range(len(program.jaxpr.outvars))]
    part, used, *_ = partial_eval.dce_jaxpr(program.jaxpr, wanted)
    if any(used):
        return None
    # In a thread of its own: it has neither the trace of the caller nor its mesh, whose devices need not exist.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        return other.submit(lambda: np.asarray(jaxpr_as_fun(ClosedJaxpr(part, program.consts))()[0])).result()


def _without_effects(program: Any) -> Any:
    """A program whose callbacks and kernels may be left out where nothing uses their outputs; other values as they are.

    JAX's dead code elimination keeps every Pallas call. Here it is an operation like others.
    """
    if isinstance(program, Jaxpr):
        return program.replace(eqns=[_pure(each) for each in program.eqns if each.outvars], effects=set())
    if isinstance(program, tuple) and all(isinstance(branch, Jaxpr) for branch in program):
        return tuple(map(_without_effects, program))
    return program


def _pure(equation: Any) -> Any:
    params = {name: _without_effects(value) for name, value in equation.params.items()}
    kept = {"primitive": OPAQUE} if equation.primitive.name in ("pallas_call", "mpmd_map") else {"params": params}
    return equation.replace(effects=set(), **kept)


def _misused(path: Path, how: str) -> str:
    return f"private training: the network uses {how.format('.'.join(map(str, path)))}. {CURE}"


def _gradient(hooked: HookedGradients, factor, dims, shape) -> Array:
    if hooked.gradient is not None:
        return weighted_sum(hooked.gradient, factor)
    num_experts = 0 if hooked.groups is None else shape[0]
    return product_gradient(hooked, factor, dims, num_experts).reshape(shape)


def _by_path(hooked: nnx.State) -> dict[Path, Any]:
    """What the hook of each parameter returned, by the path of the parameter."""
    return {hook.get_metadata()["path"]: hook.get_value() for _, hook in nnx.to_flat_state(hooked)}


def _by_layer(norm_sq: Array) -> Array:
    return norm_sq if norm_sq.ndim == 2 else norm_sq[None]


def _zeros(variable: nnx.Variable) -> Array:
    return jnp.zeros(variable.shape, jnp.float32)


def _kernel(path: Path) -> Path:
    return (*path[:-1], "kernel")


def _stacked(variable: nnx.Variable) -> bool:
    return variable.ndim > len(variable.get_metadata()["dims"].split())


def _map_variables(function: Callable[[Path, nnx.Variable], nnx.Variable], state: nnx.State) -> nnx.State:
    return nnx.from_flat_state([(path, function(path, variable)) for path, variable in nnx.to_flat_state(state)])
