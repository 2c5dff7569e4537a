"""What is particular to the norms: the definitions against the formulas, the public functions' errors, their loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backend, gated_residual_norm, modulated_norm


pytestmark = pytest.mark.recorded


B, T, D = 2, 3, 8


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [None if s is None else jax.random.normal(k, s) + 0.5 for k, s in zip(keys, shapes, strict=True)]


def by_token(a):
    return 0 if a is None else a if a.ndim == 3 else a[:, None]


def formula(x, scale, shift, weight, kind, eps):
    """In numpy, at the precision of what it is given; the mean and the variance are numpy's own."""
    mean = x.mean(axis=-1, keepdims=True) if kind == "layer" else 0.0
    square = x.var(axis=-1, keepdims=True) if kind == "layer" else (x**2).mean(axis=-1, keepdims=True)
    y = (x - mean) / np.sqrt(square + eps)
    return y * (1 if weight is None else weight) * (1 + by_token(scale)) + by_token(shift)


MODULATIONS = [((B, D), (B, D), None), ((B, T, D), (B, D), (D,)), ((B, D), (B, T, D), None), (None, None, (D,)),
               (None, (B, D), None), ((B, D), None, (D,)), ((B, D), None, None), (None, None, None)]  # fmt: skip


@pytest.mark.parametrize("shapes", MODULATIONS, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_is_the_formula(kind, shapes):
    """Against numpy in float64, by example, by token, and with what is left out."""
    x, scale, shift, weight = given = arrays((B, T, D), *shapes)
    eps = 0.1  # large, so that where it is added shows
    want = formula(*(None if a is None else np.asarray(a, np.float64) for a in given), kind, eps)
    got = modulated_norm(x, scale, shift, weight=weight, kind=kind, eps=eps, implementation="xla")
    # Seven roundings of float32 to an element, one after the other: norm (3), weight, 1 + scale, product, sum.
    assert np.abs(got - want).max() <= 7 * np.finfo(np.float32).eps * np.abs(want).max()


@pytest.mark.parametrize("gated", [(B, D), (B, T, D)], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_residual_reference_is_the_formula(kind, gated):
    x, branch, gate, scale, shift = given = arrays((B, T, D), (B, T, D), gated, (B, D), (B, D))
    wide = [np.asarray(a, np.float64) for a in given]
    want_x = wide[0] + by_token(wide[2]) * wide[1]
    want_y = formula(want_x, wide[3], wide[4], None, kind, 0.1)
    got_x, got_y = gated_residual_norm(x, branch, gate, scale, shift, kind=kind, eps=0.1, implementation="xla")
    for got, want, roundings in ((got_x, want_x, 2), (got_y, want_y, 8)):
        assert np.abs(got - want).max() <= roundings * np.finfo(np.float32).eps * np.abs(want).max()


def both_ways(function, implementation, given):
    """The outputs and the gradients of the arrays that there are."""
    at = [i for i, a in enumerate(given) if a is not None]
    call = lambda *some: function(*(some[at.index(i)] if i in at else None for i in range(len(given))), implementation)
    with backend.interpret_mode():
        out, vjp = jax.vjp(call, *(given[i] for i in at))
        return [*jax.tree.leaves(out), *vjp(jax.tree.map(jnp.cos, out))]


@pytest.mark.parametrize("shapes", MODULATIONS, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_kernel_takes_each_modulation_by_itself(kind, shapes):
    """One for each example beside one for each token, or beside none: both ways, at an eps that shows."""
    function = lambda x, scale, shift, weight, implementation: modulated_norm(
        x, scale, shift, weight=weight, kind=kind, eps=0.1, implementation=implementation
    )
    given = arrays((B, T, D), *shapes)
    got, want = (both_ways(function, name, given) for name in ("triton", "xla"))
    for mine, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("shapes", [((B, T, D), (B, D), (B, D)), ((B, D), (B, T, D), (B, D))], ids=str)
def test_the_residual_kernel_takes_each_modulation_by_itself(shapes):
    function = lambda *arrays: gated_residual_norm(*arrays[:-1], implementation=arrays[-1])
    given = arrays((B, T, D), (B, T, D), *shapes)
    got, want = (both_ways(function, name, given) for name in ("triton", "xla"))
    for mine, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_what_is_normalised_is_what_is_returned(implementation):
    """x_new is rounded once, and the backward reads it: its norm must be of the rounded one."""
    x, branch, gate = (a.astype(jnp.bfloat16) for a in arrays((B, T, D), (B, T, D), (B, D)))
    with backend.interpret_mode():
        x_new, y = gated_residual_norm(x, branch, gate, implementation=implementation)
        np.testing.assert_array_equal(y, modulated_norm(x_new, implementation=implementation))


def test_results_have_the_dtype_of_x():
    x, branch, gate, scale, shift = arrays((B, T, D), (B, T, D), *[(B, D)] * 3)
    narrow, branch = x.astype(jnp.bfloat16), branch.astype(jnp.bfloat16)
    outs = [modulated_norm(narrow, scale, shift), *gated_residual_norm(narrow, branch, gate, scale, shift)]
    assert [out.dtype for out in outs] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("kind", ["batch", None])
def test_unknown_kind_names_the_choices(kind, unchecked_arrays):
    x, branch, gate = arrays((B, T, D), (B, T, D), (B, D))
    with pytest.raises(ValueError, match=f"^modulated_norm: no kind={kind!r}; choose from layer, rms"):
        modulated_norm(x, kind=kind)
    with pytest.raises(ValueError, match=f"^gated_residual_norm: no kind={kind!r}; choose from layer, rms"):
        gated_residual_norm(x, branch, gate, kind=kind)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 1), (2, 1, 8)])
def test_shapes_that_would_only_broadcast_are_refused(shape, unchecked_arrays):
    x, branch, scale = arrays((B, T, D), (B, T, D), (B, D))
    with pytest.raises(ValueError, match=r"shift \(.*\) does not fit x \(2, 3, 8\); give it as \(B, D\) = \(2, 8\)"):
        modulated_norm(x, scale, jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"gate \(.*\) does not fit x \(2, 3, 8\); give it as \(B, D\) = \(2, 8\)"):
        gated_residual_norm(x, branch, jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"branch \(.*\) float32 does not fit x \(2, 3, 8\) float32; give both"):
        gated_residual_norm(x, jnp.zeros(shape), scale)


def test_a_weight_and_an_x_of_other_shapes_are_refused(unchecked_arrays):
    x, weight = arrays((B, T, D), (1, D))
    with pytest.raises(ValueError, match=r"weight \(1, 8\) does not fit x \(2, 3, 8\); give it as \(D,\) = \(8,\)"):
        modulated_norm(x, weight=weight)
    with pytest.raises(ValueError, match=r"x is \(3, 8\); give it as \(B, T, D\)"):
        modulated_norm(x[0])
