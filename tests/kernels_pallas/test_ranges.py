"""Ranges for Nsight: there on a GPU, in order, at no cost to their neighbours; nothing elsewhere."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import backend, deviceless, profile_range
from kernels_pallas.ffi import custom_calls, libraries, ranges


pytestmark = pytest.mark.recorded("kernels_pallas/csrc")


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
    assert calls_in(text) == [("range_push", "phase"), ("range_pop", "phase")]
    assert "range_p" not in plain.as_text()
    entry = lambda c: c.as_text().split("\nENTRY ")[1].split("\n}")[0]
    alone = lambda c: re.findall(r" (sine|tanh|exponential|multiply|add|subtract|copy|copy-start)\(", entry(c))
    assert alone(named) == alone(plain) == []  # each side's arithmetic is still fused, and nothing is copied
    donated = lambda c: c.memory_analysis().alias_size_in_bytes
    assert donated(named) == donated(plain) > 0


def phase(x, w):
    return profile_range("phase", lambda x, w: jnp.tanh(x @ w) @ w)(x * 2, w)


def closes_over(x, w):
    return profile_range("phase", lambda x: jnp.tanh(x @ w) @ w)(x)


def whole_loss(x, w):
    return profile_range("loss", lambda x, w: jnp.sum(jnp.tanh(x @ w)))(x, w)


def first_result_unused(x, w):
    return profile_range("phase", lambda x, w: (x @ w, jnp.tanh(x) @ w))(x, w)[1]


def integers_first(x, w):
    rows = jnp.arange(len(x), dtype=jnp.int32)
    return profile_range("phase", lambda rows, x, w: (jnp.tanh(x @ w), rows[0] + x))(rows, x, w)[0]


def nothing_first(x, w):
    return profile_range("phase", lambda nothing, key, x: x @ w)(jnp.zeros((0, 3)), jax.random.key(0), x)


def twice_alike(x, w):
    named = [profile_range("phase", f)(x) for f in (lambda x: x @ w, lambda x: jnp.tanh(x) @ w)]
    return named[0] * named[1]


def nested(x, w):
    return profile_range("outer", lambda x, w: phase(jnp.sin(x), w) * 2)(x, w)


def of_a_batch(x, w):
    return jax.vmap(phase, (0, None))(x.reshape(4, -1, w.shape[0]), w).reshape(x.shape)


def in_a_loop(x, w):
    return jax.lax.scan(lambda x, _: (phase(x, w), None), x, None, length=3)[0]


def recomputed(x, w):
    return jax.checkpoint(phase)(x, w)


FUNCTIONS = [
    phase, closes_over, whole_loss, first_result_unused, integers_first, nothing_first, twice_alike, nested, of_a_batch,
    in_a_loop, recomputed,
]  # fmt: skip
WANTED = [(), (0,), (1,), (0, 1)]  # the arguments whose gradients are
W = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def differentiated(function, wanted):
    return jax.grad(lambda x, w: jnp.sum(function(x, w) ** 2), wanted) if wanted else function


def calls_in(text):
    """(call, name) of each end of a range in a compiled program, in its order."""
    return re.findall(r'custom_call_target="(range_\w+)".*?name\s*=\s*"([\w ]+)"', text)


@pytest.mark.parametrize("wanted", [(), (1,), (0, 1)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_range_that_opens_closes(h200, function, wanted):
    with jax.set_mesh(h200):
        calls = calls_in(jax.jit(differentiated(function, wanted)).lower(X, W).compile().as_text())
    ends = collections.Counter(calls)
    assert ends and all(ends["range_push", name] == ends["range_pop", name] for _, name in ends)
    assert bool(wanted) == any(name.endswith("backward") for _, name in ends)
    if function is not twice_alike:  # its two may overlap
        assert all(calls.index(("range_push", name)) < calls.index(("range_pop", name)) for _, name in ends)


@pytest.mark.parametrize("wanted", [(), (0, 1)])
@pytest.mark.parametrize("function", [phase, first_result_unused, in_a_loop, recomputed])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_stay_sharded(h200, kind, function, wanted):
    mesh = jax.sharding.Mesh(deviceless.devices("h200", 4), ("data",), axis_types=(kind,))
    sharded = lambda x, *spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    with jax.set_mesh(mesh):
        text = jax.jit(differentiated(function, wanted)).lower(sharded(X, "data"), sharded(W)).compile().as_text()
    calls = calls_in(text)
    assert "all-gather" not in text and len(calls) >= 2
    assert calls.count(("range_push", "phase")) == calls.count(("range_pop", "phase"))
    assert re.search(r"= \(f32\[64,256\]\S*, f32\[\]\) custom-call", text)  # a quarter of the rows


def test_inside_shard_map_too(h200):
    mesh = jax.sharding.Mesh(deviceless.devices("h200", 4), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    of_rows = jax.shard_map(phase, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    with jax.set_mesh(mesh):
        text = jax.jit(of_rows).lower(X, W).compile().as_text()
    assert calls_in(text) == [("range_push", "phase"), ("range_pop", "phase")] and "all-gather" not in text


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The CPU, with calls that hand on what they are given; what they were is in the list."""
    made = []

    def call(target, outs, *arrays, name, **_):
        made.append((target, name, [array.shape for array in arrays]))
        return [array + jnp.zeros(out.shape, out.dtype) for array, out in zip(arrays, outs, strict=True)]

    monkeypatch.setattr(ranges.custom_calls, "call", call)
    monkeypatch.setattr(ranges.custom_calls, "why_not", lambda: None)
    monkeypatch.setattr(ranges.backend, "target", lambda: backend.Target("gpu", "NVIDIA H200", 9.0))
    return made


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_and_gradients_are_the_functions(as_if_on_a_gpu, monkeypatch, function, wanted):
    x, w = (0.3 * jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
    jax.clear_caches()  # of what was traced with ranges
    with monkeypatch.context() as patch:
        patch.setattr(ranges.custom_calls, "why_not", lambda: "not now")
        plain = jax.jit(differentiated(function, wanted))(x, w)
    assert not as_if_on_a_gpu
    jax.clear_caches()
    named = jax.jit(differentiated(function, wanted))(x, w)
    assert as_if_on_a_gpu
    for found, expected in zip(jax.tree.leaves(named), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_without_arrays_it_is_the_function(as_if_on_a_gpu):
    assert profile_range("phase", lambda a, b: a + b)(1, b=2) == 3
    assert profile_range("phase", lambda x: x.shape)(jnp.ones((2, 3))) == (2, 3)


def test_weights_that_are_not_the_first_argument_pass_no_call(as_if_on_a_gpu):
    phase(jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert as_if_on_a_gpu == [(call, "phase", [(8, 8), ()]) for call in ("range_push", "range_pop")]


def test_without_the_custom_calls_it_is_the_function(h200, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    assert "range_p" not in compiled(h200, lambda x: step(x, profile_range)).as_text()
