"""What is particular to the MLPs: the definitions against the formulas, any leading dims, one-line errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kernels_pallas import backend, dense_mlp, gated_mlp
from kernels_pallas.mlp.activations import ACTIVATIONS, value_and_derivative


pytestmark = pytest.mark.recorded


B, T, D, F = 2, 3, 8, 12


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def activated(x, activation):
    """In float64, by other formulas: silu as x / (1 + exp(-x)), GELU's tanh as a tanh."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_references_are_the_formulas(activation):
    x, gate_up, down, up, b_up, b_down = arrays((B, T, D), (D, 2, F), (F, D), (D, F), (F,), (D,))
    wide = lambda *xs: [np.asarray(x, np.float64) for x in xs]
    x64, gate_up64, down64, up64, b_up64, b_down64 = wide(x, gate_up, down, up, b_up, b_down)
    want = (activated(x64 @ gate_up64[:, 0], activation) * (x64 @ gate_up64[:, 1])) @ down64
    got = gated_mlp(x, gate_up, down, activation=activation)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    want = activated(x64 @ up64 + b_up64, activation) @ down64 + b_down64
    got = dense_mlp(x, up, b_up, down, b_down, activation=activation)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_activation_and_its_derivative(activation):
    """Against float64 and its difference quotient, from where it vanishes to where it is the identity."""
    x = np.linspace(-12, 12, 4001)
    value, derivative = value_and_derivative(jnp.asarray(x, jnp.float32), activation)
    np.testing.assert_allclose(value, activated(x, activation), rtol=2e-5, atol=1e-6)
    step = 1e-5
    quotient = (activated(x + step, activation) - activated(x - step, activation)) / (2 * step)
    np.testing.assert_allclose(derivative, quotient, rtol=2e-5, atol=2e-6)


def test_gelu_tanh_is_close_to_gelu():
    x = np.linspace(-4, 4, 101)
    value, _ = value_and_derivative(jnp.asarray(x, jnp.float32), "gelu_tanh")
    np.testing.assert_allclose(value, x * scipy.special.ndtr(x), atol=5e-4)


def test_half_of_the_last_column_tile_may_be_empty():
    """96 columns in tiles of 64: halves of 32 divide them, and yet the last half lies past the end."""
    given = arrays((5, 16), (16, 2, 96), (96, 16))

    def both_ways(implementation, *given):
        out, vjp = jax.vjp(functools.partial(gated_mlp, implementation=implementation), *given)
        return [out, *vjp(jnp.cos(out))]

    with backend.interpret_mode():
        got, want = (jax.jit(functools.partial(both_ways, name))(*given) for name in ("triton", "xla"))
    for mine, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_leading_dims_are_rows():
    x, gate_up, down = arrays((B, T, D), (D, 2, F), (F, D))
    rows = gated_mlp(x.reshape(-1, D), gate_up, down)
    np.testing.assert_array_equal(gated_mlp(x, gate_up, down), rows.reshape(x.shape))


@pytest.mark.parametrize("shapes", [((T, D), (D, F), (F, D)), ((T, D), (D, 3, F), (F, D)), ((T, D), (D, 2, F), (D, F)),
                                    ((T, F), (D, 2, F), (F, D))], ids=str)  # fmt: skip
def test_what_does_not_fit_a_gated_mlp_is_refused(shapes, unchecked_arrays):
    with pytest.raises(
        ValueError, match=r"^gated_mlp: x .* do not fit; give x as \(\.\.\., D\), w_gate_up as \(D, 2, F\)"
    ):
        gated_mlp(*arrays(*shapes))


@pytest.mark.parametrize("change", [{0: (T, F)}, {1: (D, 1, F)}, {2: (D,)}, {3: (D, F)}, {4: (F,)}], ids=str)
def test_what_does_not_fit_a_dense_mlp_is_refused(change, unchecked_arrays):
    shapes = dict(enumerate([(T, D), (D, F), (F,), (F, D), (D,)])) | change
    with pytest.raises(ValueError, match=r"^dense_mlp: x .* do not fit; give x as \(\.\.\., D\), the rest as \(D, F\)"):
        dense_mlp(*arrays(*shapes.values()))


def test_an_unknown_activation_names_the_choices(unchecked_arrays):
    x, gate_up, down, up, b_up, b_down = arrays((T, D), (D, 2, F), (F, D), (D, F), (F,), (D,))
    with pytest.raises(ValueError, match="^gated_mlp: no activation='relu'; choose from silu, gelu_tanh"):
        gated_mlp(x, gate_up, down, activation="relu")
    with pytest.raises(ValueError, match="^dense_mlp: no activation='relu'; choose from silu, gelu_tanh"):
        dense_mlp(x, up, b_up, down, b_down, activation="relu")


def test_mixed_dtypes_do_not_run_as_a_kernel():
    x, gate_up, down = arrays((T, D), (D, 2, F), (F, D))
    with pytest.raises(NotImplementedError, match="needs all arrays in one dtype among bfloat16, float16, float32"):
        gated_mlp(x.astype(jnp.bfloat16), gate_up, down, implementation="triton")
