"""What every kernel family is made of, and how one of its implementations is picked.

An `Op` is a table, not a base class: the reference that defines the answer, the kernels that compute it faster, the
work it cannot avoid, and the named cases that tests, benchmarks and the inspector run. A new kernel is one file and
one line in it.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import measured


log = logging.getLogger("kernels_pallas")

PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work one pass cannot avoid: its arithmetic, one read of each input, one write of each output."""

    flops: int  # a multiply-add is 2
    bytes: int
    transcendentals: int = 0

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """Roofline: no run is shorter. `peak_flops` in flop/s, `bandwidth` in bytes/s."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)

    def estimate(self) -> pl.CostEstimate:
        """The same figures as XLA's scheduler wants them."""
        return pl.CostEstimate(
            flops=self.flops,
            bytes_accessed=self.bytes,
            transcendentals=self.transcendentals,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One named problem size: `arrays` are shapes, `static` keyword options, `origin` the model it comes from.

    As with the arrays of any op, an entry may be a tree of them, and None where an optional one is left out.
    """

    arrays: tuple[Any, ...]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = ""
    tiny: bool = False  # small enough for interpret mode on a CPU
    make: Callable[[jax.Array], tuple[Any, ...]] | None = None  # where values matter
    huge: bool = False  # too large for the definition, even on a GPU: only `bench` runs it, beside a library

    def random(self, key: jax.Array) -> tuple[Any, ...]:
        """Fresh inputs: standard normal, unless the case makes its own."""
        if self.make is not None:
            return self.make(key)
        shapes, tree = jax.tree.flatten(self.arrays)
        keys = jax.random.split(key, len(shapes))
        arrays = [jax.random.normal(k, a.shape, jnp.float32).astype(a.dtype) for k, a in zip(keys, shapes, strict=True)]
        return jax.tree.unflatten(tree, arrays)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A forward and backward pair.

    forward(*arrays, **static) -> (out, residuals)
    backward(residuals, d_out, **static) -> one cotangent for each array, None for integers
    unsupported(*arrays, **static) -> None, or why these arguments cannot run here
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None]
    external: bool = False  # somebody else's: nothing here to interpret or to inspect
    # What `tune` tries for each GPU function that asks `tuning.blocks`, by its full name:
    # (default, *, dtype, width, mask, size) -> configs of the default's class.
    candidates: Mapping[str, Callable[..., Iterable[Any]]] = dataclasses.field(default_factory=dict)
    needs_gpu_proof: bool = False  # chosen only on a device with a passing run of today's source in results/


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation and everything that computes it."""

    name: str
    reference: Callable[..., Any]  # the definition; also implementation="xla"
    kernels: Mapping[str, Kernel]  # fastest first, where nothing was measured
    cost: Mapping[str, Callable[..., Cost]]  # one function a pass
    cases: dict[str, Case]
    sweep: dict[str, Case] = dataclasses.field(default_factory=dict)  # more sizes for `bench` alone

    @property
    def passes(self) -> tuple[str, ...]:
        """ "forward", and "backward" where it has a cost of its own: decoding has none."""
        return tuple(self.cost)

    def __call__(self, *arrays, implementation: str | None = None, **static):
        """Runs `implementation`, or the one that `choose` names.

        Raises:
          ValueError: there is no implementation of that name.
          NotImplementedError: it cannot run these arguments here; the message says why and what can.
        """
        if implementation is None:
            implementation = self.choose(*arrays, **static)
        if implementation == "xla":
            return self.reference(*arrays, **static)
        if implementation not in self.kernels:
            known = ", ".join(["xla", *self.kernels])
            raise ValueError(f"{self.name}: no {implementation=}; choose from {known}.")
        kernel = self.kernels[implementation]
        if reason := kernel.unsupported(*arrays, **static):
            others = ", ".join(self.runnable(*arrays, **static))
            raise NotImplementedError(
                f"{self.name}: {implementation=} cannot run here: {reason}. Leave it None, or choose from: {others}."
            )
        return differentiable(kernel, **static)(*arrays)

    def runnable(self, *arrays, **static) -> list[str]:
        """Names of what can run these arguments here, in the table's order, "xla" last."""
        names = [n for n, k in self.kernels.items() if not k.unsupported(*arrays, **static)]
        return [*names, "xla"]

    def choose(self, *arrays, **static) -> str:
        """The fastest by this device's shipped measurements; without one, the table's first that runs."""
        names = []
        for name, kernel in self.kernels.items():
            reason = kernel.unsupported(*arrays, **static)
            if reason is None and kernel.needs_gpu_proof and not measured.passed(self, name):
                reason = "results/ has no passing run of today's source on this device; it runs by its name"
            if reason is None:
                names.append(name)
            else:
                _log_once(f"{self.name}: not using {name}: {reason}.")
        names.append("xla")
        return measured.fastest(self, names, arrays, static) or names[0]

    def case_named(self, arrays, static) -> str | None:
        """The name of the case with these shapes, dtypes and options, if there is one."""
        wanted = _signature(arrays, static)
        for name, case in (self.cases | self.sweep).items():
            if _signature(case.arrays, case.static) == wanted:
                return name
        return None


def differentiable(kernel: Kernel, **static) -> Callable[..., Any]:
    """One function of arrays whose gradient is the kernel's own backward: the only custom_vjp in the package."""

    @jax.custom_vjp
    def call(*arrays):
        return kernel.forward(*arrays, **static)[0]

    def forward(*arrays):
        return kernel.forward(*arrays, **static)

    def backward(residuals, d_out):
        return tuple(kernel.backward(residuals, d_out, **static))

    call.defvjp(forward, backward)
    return call


def _signature(arrays, static):
    leaves, tree = jax.tree.flatten(arrays)
    shapes = tuple((a.shape, jnp.dtype(a.dtype).name) for a in leaves)
    return shapes, tree, tuple(sorted((k, v) for k, v in static.items() if v is not None))


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
