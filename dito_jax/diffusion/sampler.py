"""Samplers: ODE solvers (Euler, Heun) of dz/dt = v(z, t) from noise to data."""

import jax
from jaxtyping import Array, Float

from dito_jax.diffusion.guidance import Velocity


def euler(velocity: Velocity, noise: Float[Array, "B h w c"], times: Float[Array, " times"]) -> Float[Array, "B h w c"]:
    """Euler's method: z += (t' - t) v(z, t) for each pair of neighbouring `times`; one evaluation per step."""

    def step(z, pair):
        t, t_next = pair
        return z + (t_next - t) * velocity(z, t), None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]


def heun(velocity: Velocity, noise: Float[Array, "B h w c"], times: Float[Array, " times"]) -> Float[Array, "B h w c"]:
    """Heun's method: z += (t' - t) (v(z, t) + v(z_euler, t')) / 2, two evaluations per step.

    The last step is an Euler step, because the velocity at t = 1 divides by 1 - t (EDM, arXiv 2206.00364 alg. 1).
    """

    def step(z, pair):
        t, t_next = pair
        v = velocity(z, t)
        v_next = velocity(z + (t_next - t) * v, t_next)
        return z + (t_next - t) * 0.5 * (v + v_next), None

    z, _ = jax.lax.scan(step, noise, (times[:-2], times[1:-1]))
    return euler(velocity, z, times[-2:])


SAMPLERS = {"euler": euler, "heun": heun}
