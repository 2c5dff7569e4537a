"""Ranges for Nsight: there on a GPU, in order, at no cost to their neighbours; nothing elsewhere."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import custom_calls, deviceless, libraries, profile_range


@pytest.fixture(scope="module")
def h200():
    """A GPU that is not there, with the custom calls built for it."""
    if libraries.compiler("cuda") is None:
        pytest.skip("no nvcc here")
    libraries.build("cuda")
    return deviceless.mesh("h200")


def step(x, phase=lambda name, function: function):
    """Work before, inside and after; each a fusion of its own for want of one over a product."""
    before = jnp.sin(x) * 2 + 1
    inside = phase("phase", lambda a: jnp.tanh(a @ a) * 3 - a)(before)
    return jnp.exp(inside @ inside) * 0.5 + x


X = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def compiled(mesh, function):
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=0).lower(X).compile()


def test_elsewhere_it_is_the_function_itself():
    x = jnp.ones((4, 4))
    named, plain = (jax.make_jaxpr(lambda x, p=p: step(x, *p))(x) for p in ((profile_range,), ()))
    assert str(named) == str(plain)


def test_on_a_gpu_ranges_open_and_close_and_their_neighbours_stay_as_they_were(h200):
    named, plain = compiled(h200, lambda x: step(x, profile_range)), compiled(h200, step)
    text = named.as_text()
    calls = re.findall(r'custom_call_target="(range_\w+)".*?name\s*=\s*"([\w ]+)"', text)
    assert calls == [("range_push", "phase"), ("range_pop", "phase")]
    assert "range_p" not in plain.as_text()
    entry = lambda c: c.as_text().split("\nENTRY ")[1].split("\n}")[0]
    alone = lambda c: re.findall(r" (sine|tanh|exponential|multiply|add|subtract|copy|copy-start)\(", entry(c))
    assert alone(named) == alone(plain) == []  # each side's arithmetic is still fused, and nothing is copied
    donated = lambda c: c.memory_analysis().alias_size_in_bytes
    assert donated(named) == donated(plain) > 0


def test_a_backward_pass_has_ranges_of_its_own(h200):
    named = compiled(h200, jax.grad(lambda x: jnp.sum(step(x, profile_range))))
    calls = re.findall(r'custom_call_target="(range_\w+)".*?name\s*=\s*"([\w ]+)"', named.as_text())
    assert sorted(calls) == sorted(
        (call, name) for call in ("range_push", "range_pop") for name in ("phase", "phase backward")
    )
    assert calls.index(("range_push", "phase backward")) < calls.index(("range_pop", "phase backward"))


def test_without_the_custom_calls_it_is_the_function(h200, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    assert "range_p" not in compiled(h200, lambda x: step(x, profile_range)).as_text()
