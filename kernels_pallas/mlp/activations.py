"""The activations SiLU and tanh-GELU with their derivatives; both are x * sigmoid(k(x)) with a polynomial k."""

import math

import jax.numpy as jnp


ACTIVATIONS = ("silu", "gelu_tanh")
_SLOPE, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def activated(x, activation: str):
    """f(x).

    silu(x) = x sigmoid(x); gelu_tanh(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2/pi) (x + 0.044715 x^3):
    arXiv 1606.08415, section 2.
    """
    k = x if activation == "silu" else _SLOPE * x * (1.0 + _CUBE * x * x)
    return x / (1.0 + jnp.exp(-k))


def value_and_derivative(x, activation: str):
    """(f(x), f'(x))."""
    square = x * x
    d_k = 1.0 if activation == "silu" else _SLOPE * (1.0 + 3 * _CUBE * square)
    k = x if activation == "silu" else _SLOPE * x * (1.0 + _CUBE * square)
    sigmoid = 1.0 / (1.0 + jnp.exp(-k))
    value = x * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * d_k
