"""Timestep sampling for training and the timestep schedule of samplers; t = 1 is data (see path.py)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def uniform(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """t ~ U(0, 1)."""
    return jax.random.uniform(key, (num,))


def logit_normal(key: Key[Array, ""], num: int, *, mean: float, std: float) -> Float[Array, " num"]:
    """t = sigmoid(N(mean, std)); a negative mean favours noisy timesteps (SD3, arXiv 2403.03206 §3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (num,)))


def logit_normal_density(t: Float[Array, " num"], *, mean: float, std: float) -> Float[Array, " num"]:
    """The probability density of `logit_normal` at t in (0, 1)."""
    return jax.scipy.stats.norm.pdf(jax.scipy.special.logit(t), mean, std) / (t * (1 - t))


def shift_time(t: Float[Array, "*num"], shift: float) -> Float[Array, "*num"]:
    """Timestep shift t / (t + shift (1 - t)): shift > 1 favours noisy timesteps, for large images (SD3 eq. 23)."""
    return t / (t + shift * (1 - t))


def unshift_time(t: Float[Array, "*num"], shift: float) -> Float[Array, "*num"]:
    """The inverse of `shift_time`: shift t / (1 + (shift - 1) t), with the derivative shift / (1 + (shift - 1) t)^2."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, *, shift: float = 1.0) -> Float[Array, " times"]:
    """The steps + 1 timesteps of a sampler, from noise (0) to data (1)."""
    return shift_time(jnp.linspace(0.0, 1.0, steps + 1), shift)
