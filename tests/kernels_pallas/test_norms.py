"""What is particular to the norms: the definition against the formula, and the public function's errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import modulated_norm


def arrays(B=2, T=3, D=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, D), (B, D), (B, D))
    return [jax.random.normal(k, s) + 0.5 for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_is_the_formula(kind):
    """Against numpy in float64, the mean and the variance its own."""
    x, scale, shift = (np.asarray(a, np.float64) for a in arrays())
    eps = 0.1  # large, so that where it is added shows
    mean = x.mean(axis=-1, keepdims=True) if kind == "layer" else 0.0
    square = x.var(axis=-1, keepdims=True) if kind == "layer" else (x**2).mean(axis=-1, keepdims=True)
    want = (x - mean) / np.sqrt(square + eps) * (1 + scale[:, None]) + shift[:, None]
    got = modulated_norm(*arrays(), kind=kind, eps=eps, implementation="xla")
    # Six roundings of float32 to an element, one after the other: norm (3), 1 + scale, product, sum.
    assert np.abs(got - want).max() <= 6 * np.finfo(np.float32).eps * np.abs(want).max()


def test_result_has_the_dtype_of_x():
    x, scale, shift = arrays()
    assert modulated_norm(x.astype(jnp.bfloat16), scale, shift).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["batch", None])
def test_unknown_kind_names_the_choices(kind, unchecked_arrays):
    with pytest.raises(ValueError, match=f"no kind={kind!r}; choose from layer, rms"):
        modulated_norm(*arrays(), kind=kind)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 1), (2, 1, 8)])
def test_shapes_that_would_only_broadcast_are_refused(shape, unchecked_arrays):
    x, scale, _ = arrays()
    with pytest.raises(ValueError, match=r"shift \(.*\) do not fit; give x as \(B, T, D\)"):
        modulated_norm(x, scale, jnp.zeros(shape))
