"""What is particular to losses: the definition against the formula, chunks of the vocabulary, memory, errors."""

import functools
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import LINEAR_CROSS_ENTROPY, backend, deviceless, linear_cross_entropy
from kernels_pallas.losses import triton


pytestmark = pytest.mark.recorded


R, D, V = 6, 8, 20
ROOT = Path(__file__).parents[2]


def arrays(R=R, D=D, V=V):
    keys = jax.random.split(jax.random.key(0), 3)
    labels = jax.random.randint(keys[2], (R,), 0, V, jnp.int32)
    return jax.random.normal(keys[0], (R, D)), jax.random.normal(keys[1], (D, V)), labels


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_is_the_formula(softcap):
    """In float64, row by row."""
    x, w, labels = arrays()
    labels = labels.at[1].set(-1)
    loss, lse = linear_cross_entropy(x, w, labels, ignore_index=-1, z_loss=0.1, logit_softcap=softcap)
    for r in range(R):
        logits = np.asarray(x, np.float64)[r] @ np.asarray(w, np.float64)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        want = np.log(np.exp(logits).sum())
        np.testing.assert_allclose(lse[r], want, rtol=1e-5)
        if r == 1:
            assert loss[r] == 0
        else:
            np.testing.assert_allclose(loss[r], want - logits[labels[r]] + 0.1 * want**2, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_logits_that_overflow_an_exponential_do_no_harm(implementation):
    x, w, labels = arrays()

    def total(x):
        loss, lse = linear_cross_entropy(1e3 * x, w, labels, implementation=implementation)
        return loss.sum(), (loss, lse)

    with backend.interpret_mode():
        gradient, (loss, lse) = jax.grad(total, has_aux=True)(x)
    assert np.isfinite(loss).all() and np.isfinite(lse).all() and np.isfinite(gradient).all()


def gradients(implementation, x, w, labels, **static):
    def total(x, w):
        loss, lse = linear_cross_entropy(x, w, labels, implementation=implementation, **static)
        return jnp.sum(loss * jnp.arange(len(loss))) + jnp.sum(jnp.sin(lse))

    return jax.grad(total, argnums=(0, 1))(x, w)


@pytest.mark.parametrize("width, softcap", [(384, None), (300, None), (300, 3.0), (130, None), (64, None)])
def test_chunks_of_the_vocabulary_add_up(width, softcap):
    """Three whole ones, two and a rest, one and a rest as narrow as can be, and less than one."""
    x, w, labels = arrays(R=20, V=width)
    labels, static = labels.at[::3].set(-100), dict(z_loss=1e-2, logit_softcap=softcap)
    with mock.patch.object(triton, "CHUNK", 128), backend.interpret_mode():
        got = gradients("triton", x, w, labels, **static)
    for mine, theirs in zip(got, gradients("xla", x, w, labels, **static), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("ignored", [0, 7, 20])
def test_any_number_may_stand_for_no_label(ignored):
    """A class's own, as where padding is one, or one past the last."""
    x, w, labels = arrays()
    labels, static = labels.at[::2].set(ignored), dict(ignore_index=ignored, z_loss=1e-2)
    with backend.interpret_mode():
        loss, _ = linear_cross_entropy(x, w, labels, implementation="triton", **static)
        got = gradients("triton", x, w, labels, **static)
    np.testing.assert_array_equal(loss == 0, labels == ignored)
    for mine, theirs in zip(got, gradients("xla", x, w, labels, **static), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.deviceless
def test_memory_is_a_twentieth_of_the_logits():
    """At a vocabulary of 128 k, forward and backward, beside what goes in and comes out; plain logits in bfloat16."""
    if reason := deviceless.why_not():
        pytest.skip(reason)
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours, plain = map(int, done.stdout.split())
    assert 0 < ours < 0.05 * plain


def print_memory():
    """Temporary bytes of the kernel's passes and of the plain form's, compiled for an H200."""
    jax.config.update("jax_platforms", "cpu")
    mesh, case = deviceless.mesh("h200"), LINEAR_CROSS_ENTROPY.cases["v128k"]

    def plain(x, w, labels):
        logits = x @ w
        lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
        return lse - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(jnp.float32), lse

    for function in (functools.partial(LINEAR_CROSS_ENTROPY, implementation="triton", **case.static), plain):

        def passes(x, w, labels, d_out, function=function):
            out, vjp = jax.vjp(lambda x, w: function(x, w, labels), x, w)
            return out, vjp(d_out)

        d_out = (jax.ShapeDtypeStruct(case.arrays[2].shape, jnp.float32),) * 2
        with jax.set_mesh(mesh):
            whole = jax.jit(passes, in_shardings=jax.sharding.NamedSharding(mesh, jax.P()))
            print(whole.lower(*case.arrays, d_out).compile().memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=jnp.zeros((R, D + 1))), r"x \(6, 9\), w \(8, 20\) and labels \(6,\) do not fit; give x as \(R, D\)"),
        (dict(labels=jnp.zeros((R, 1), jnp.int32)), r"labels \(6, 1\) do not fit"),
        (dict(labels=jnp.zeros(R)), "labels are float32; give class indices as int32"),
        (dict(z_loss=-1.0), "z_loss must be a finite number of 0 or more, got -1.0"),
        (dict(logit_softcap=0.0), "logit_softcap must be a finite number above 0, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, words, unchecked_arrays):
    x, w, labels = arrays()
    given = dict(x=x, w=w, labels=labels) | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: .*{words}"):
        linear_cross_entropy(**given)


if __name__ == "__main__":
    print_memory()
