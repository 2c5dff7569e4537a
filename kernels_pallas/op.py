"""The `Op` table of an operation (reference, kernels, cost model, cases) and the choice of its implementation.

An `Op` is a table, not a base class. It holds the reference implementation, which defines the result; the kernel
implementations; a cost model, the minimum work of each pass; and named cases, the problem sizes that tests, benchmarks
and `inspect` run. A new kernel implementation is one file and one entry in the table.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import pallas as pl

from . import backend, measured, tuning


log = logging.getLogger("kernels_pallas")

PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The minimum work of one pass: its arithmetic, one read of each input and one write of each output."""

    flops: int  # a multiply-add is 2
    bytes: int
    transcendentals: int = 0

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The roofline bound, in seconds: no run is shorter. `peak_flops` is in flop/s, `bandwidth` in bytes/s."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)

    def estimate(self) -> pl.CostEstimate:
        """The same figures as the cost estimate that XLA's scheduler reads."""
        return pl.CostEstimate(
            flops=self.flops,
            bytes_accessed=self.bytes,
            transcendentals=self.transcendentals,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One named problem size: `arrays` are shapes, `static` the keyword options, `origin` the model it comes from.

    As for the arrays of any op, an entry of `arrays` may be a pytree; it is None where an optional array is omitted.
    """

    arrays: tuple[Any, ...]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = ""
    tiny: bool = False  # small enough for interpret mode on a CPU
    make: Callable[[jax.Array], tuple[Any, ...]] | None = None  # makes the inputs, where random values do not do
    huge: bool = False  # too large for the reference even on a GPU: only `bench` runs it, checked against a baseline

    def random(self, key: jax.Array) -> tuple[Any, ...]:
        """Random inputs: standard normal, unless the case has its own `make`."""
        if self.make is not None:
            return self.make(key)
        shapes, tree = jax.tree.flatten(self.arrays)
        keys = jax.random.split(key, len(shapes))
        arrays = [jax.random.normal(k, a.shape, jnp.float32).astype(a.dtype) for k, a in zip(keys, shapes, strict=True)]
        return jax.tree.unflatten(tree, arrays)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel implementation of an op: a forward and a backward function.

    forward(*arrays, **static) -> (out, residuals)
    backward(residuals, d_out, **static) -> one cotangent for each array, None for integer arrays
    unsupported(*arrays, **static) -> None, or the reason why this implementation cannot run these arguments here
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None]
    external: bool = False  # from another library or a custom call: it cannot be interpreted or inspected
    # The search space of `tune` for each GPU function that calls `tuning.blocks`, by the function's full name:
    # (default, *, dtype, width, mask, size) -> configs of the default's class.
    candidates: Mapping[str, Callable[..., Iterable[Any]]] = dataclasses.field(default_factory=dict)
    # Chosen automatically only on a device for which results/ holds a passing run of the current source.
    needs_gpu_proof: bool = False

    def __post_init__(self):
        for name in PASSES:
            object.__setattr__(self, name, _in_32_bits(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: its reference, its kernel implementations, its cost model and its cases."""

    name: str
    reference: Callable[..., Any]  # defines the result; also implementation="xla"
    kernels: Mapping[str, Kernel]  # in the order of preference where nothing was measured
    cost: Mapping[str, Callable[..., Cost]]  # one function per pass
    cases: dict[str, Case]
    sweep: dict[str, Case] = dataclasses.field(default_factory=dict)  # additional sizes for `bench --sweep`

    @property
    def passes(self) -> tuple[str, ...]:
        """ "forward", and "backward" if the cost model has it. Decoding has no backward pass of its own."""
        return tuple(self.cost)

    def __call__(self, *arrays, implementation: str | None = None, **static):
        """Runs `implementation`, or the one that `choose` returns if it is None.

        Raises:
          ValueError: there is no implementation of that name.
          NotImplementedError: the implementation cannot run these arguments here; the message gives the reason and
            the implementations that can.
        """
        if implementation is None:
            implementation = self.choose(*arrays, **static)
        if implementation == "xla":
            return self.reference(*arrays, **static)
        if not isinstance(implementation, str) or implementation not in self.kernels:
            known = ", ".join(["xla", *self.kernels])
            raise ValueError(f"{self.name}: no {implementation=}; choose from {known}.")
        kernel = self.kernels[implementation]
        if reason := kernel.unsupported(*arrays, **static):
            others = ", ".join(self.runnable(*arrays, **static))
            raise NotImplementedError(
                f"{self.name}: {implementation=} cannot run here: {reason}. Use implementation=None, or choose from: "
                f"{others}."
            )
        return differentiable(kernel, name=f"{self.name}: {implementation=}", **static)(*arrays)

    def runnable(self, *arrays, **static) -> list[str]:
        """The names of the implementations that can run these arguments here, in the table's order, "xla" last."""
        names = [n for n, k in self.kernels.items() if not k.unsupported(*arrays, **static)]
        return [*names, "xla"]

    def choose(self, *arrays, **static) -> str:
        """The implementation that was fastest in this device's committed benchmarks, else the first one that runs.

        On a GPU each implementation that is passed over is logged once with its reason; elsewhere one line says that
        the XLA implementations are used.
        """
        names = []
        for name, kernel in self.kernels.items():
            reason = kernel.unsupported(*arrays, **static)
            if reason is None and kernel.needs_gpu_proof and not measured.passed(self, name):
                reason = (
                    "results/ has no passing run of the current source on this device; "
                    f"implementation={name!r} selects it"
                )
            if reason is None:
                names.append(name)
            else:
                _log_refusal(f"{self.name}: not using {name}: {reason}.")
        names.append("xla")
        return measured.fastest(self, names, arrays, static) or names[0]

    def case_named(self, arrays, static) -> str | None:
        """The name of the case with these shapes, dtypes and options, or None."""
        wanted = _signature(arrays, static)
        for name, case in (self.cases | self.sweep).items():
            if _signature(case.arrays, case.static) == wanted:
                return name
        return None


def differentiable(kernel: Kernel, *, name: str = "this kernel", **static) -> Callable[..., Any]:
    """A differentiable function whose gradient is the kernel's own backward. Every kernel gets its custom_vjp here.

    The gradient has no derivative of its own: a second derivative raises NotImplementedError, which begins with `name`.
    Without jit each pass is compiled once for each shape (`_compiled`).
    """
    options = tuple(sorted(static.items()))

    def of_pass(function):
        def run(*arrays):
            if kernel.external or tuning.listens() or any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays)):
                return function(*arrays, **static)
            return _compiled(function, options, backend.interpret(), backend.target(), tuning.tried())(*arrays)

        return _once(run, name)

    forward_pass, backward_pass = of_pass(kernel.forward), of_pass(kernel.backward)

    @jax.custom_vjp
    def call(*arrays):
        return forward_pass(*arrays)[0]

    def forward(*arrays):
        return forward_pass(*arrays)

    def backward(residuals, d_out):
        return tuple(backward_pass(residuals, d_out))

    call.defvjp(forward, backward)
    return call


def _in_32_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The pass traced in 32-bit mode: index arithmetic of kernels is int32, and no array that they take is wider."""

    @functools.wraps(function)
    def run(*arrays, **static):
        with jax.enable_x64(False):
            return function(*arrays, **static)

    return run


@functools.lru_cache(maxsize=1024)
def _compiled(function: Callable[..., Any], options, *context) -> Callable[..., Any]:
    """The pass under jit, for calls outside jit. `context`: all else on which the traced code depends."""
    del context
    return jax.jit(functools.partial(function, **dict(options)), inline=True)


def _once(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which raises an error that says what to do if it is differentiated."""
    once = jax.custom_jvp(function)

    def refuse(primals, tangents):
        raise NotImplementedError(
            f"{name} has first derivatives only, by jax.grad or jax.vjp: no second derivatives, no jax.jvp of a "
            'gradient. Use implementation="xla" where you need them, or apply jax.lax.stop_gradient to the gradient.'
        )

    once.defjvp(refuse)
    return once


def _signature(arrays, static):
    leaves, tree = jax.tree.flatten(arrays)
    shapes = tuple((a.shape, jnp.dtype(a.dtype).name) for a in leaves)
    return shapes, tree, tuple(sorted((k, v) for k, v in static.items() if v is not None))


def _log_refusal(message: str) -> None:
    """Logs why an implementation is not used: each reason once on a GPU, one line for all of them elsewhere."""
    device = backend.target()
    if device.platform == "gpu" or backend.interpret():
        _log_once(message)
    else:
        _log_once(f"{device.platform.upper()}: using XLA implementations (the GPU kernels need an NVIDIA GPU).")
        log.debug(message)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
