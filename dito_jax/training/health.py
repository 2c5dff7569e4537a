"""Detection of bad steps on the device: NaN or infinite values, and spikes of the loss or the gradient norm.

A step is bad if its loss or gradient norm is not finite, or is a spike: (x - median) / max(1.4826 MAD, 1 % of the
median) exceeds a threshold, where the median is that of the last good steps and MAD is the median absolute deviation.
A bad step leaves parameters, optimizer state and EMA unchanged. The host reads the result later
(resilience/guard.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


FINE, NOT_FINITE, LOSS_SPIKE, GRADIENT_SPIKE = range(4)  # values of the metric "bad"


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """NaN and loss-spike handling: which steps are bad and skipped, and when the run rolls back."""

    spike_deviations: float | None = 30.0
    """A step is bad if its loss or gradient norm is this many robust deviations above the median; None: only non-
    finite steps are bad."""
    window: int = 128
    """Number of good steps for the median; spikes are detected once half of the window is filled."""
    burst: int = 5
    """Roll back when this many bad steps occur within burst_window steps."""
    burst_window: int = 50
    """Number of most recent steps in which bad steps are counted for burst."""
    rollbacks: int = 3
    """Maximum number of rollbacks to the same checkpoint before the run stops with an error."""
    check_replicas_every: int = 0
    """Compare replicated values across devices every this many steps (silent data corruption); 0: never."""
    rerun: bool = False
    """Rerun each bad step to detect transient hardware errors; the host then waits for every step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """Loss and gradient norm of the last good steps (NaN for entries not yet filled), and step counts."""

    loss: Float[Array, " window"]
    gradient_norm: Float[Array, " window"]
    good: Int[Array, ""]  # number of good steps
    bad: Int[Array, ""]  # number of bad steps, which were skipped

    @classmethod
    def new(cls, window: int) -> "Health":
        """The initial state: no steps yet."""
        empty = jnp.full((window,), jnp.nan, jnp.float32)
        return cls(empty, jnp.copy(empty), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def examine(
    health: Health, loss: Float[Array, ""], gradient_norm: Float[Array, ""], deviations: float | None
) -> tuple[Int[Array, ""], Health]:
    """Returns FINE or the reason why a step is bad, and the Health after the step."""
    bad = jnp.where(jnp.isfinite(loss) & jnp.isfinite(gradient_norm), FINE, NOT_FINITE)
    if deviations is not None:
        known = health.good >= health.loss.size // 2
        for values, value, name in (
            (health.gradient_norm, gradient_norm, GRADIENT_SPIKE),
            (health.loss, loss, LOSS_SPIKE),
        ):
            bad = jnp.where((bad != NOT_FINITE) & known & (deviation(values, value) > deviations), name, bad)
    place = health.good % health.loss.size
    good = Health(
        loss=health.loss.at[place].set(loss),
        gradient_norm=health.gradient_norm.at[place].set(gradient_norm),
        good=health.good + 1,
        bad=health.bad,
    )
    return bad, chosen(bad == FINE, good, dataclasses.replace(health, bad=health.bad + 1))


def deviation(values: Float[Array, " window"], value: Float[Array, ""]) -> Float[Array, ""]:
    """How many robust deviations `value` is above the median of the values that are not NaN."""
    median = jnp.nanmedian(values)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(values - median))
    return (value - median) / jnp.maximum(spread, 0.01 * jnp.abs(median) + 1e-12)


def chosen[Tree](condition: Any, this: Tree, that: Tree) -> Tree:
    """Selects one of two trees by a traced condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), this, that)
