"""flash_attention_jvp under every transformation that a model meets, against JAX's own derivatives of the reference.

What is differentiated forward is compared with `jax.jvp` of the reference, and what is differentiated backward, be it
through the value of a jvp, with `jax.grad` of it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionMask, backend, flash_attention, flash_attention_jvp, hardware


pytestmark = pytest.mark.recorded


T, S, N, K, H = 6, 9, 4, 2, 16
KEYS = jax.random.split(jax.random.key(0), 5)
Q, T_Q = (jax.random.normal(key, (2, T, N, H)) for key in KEYS[:2])
KV, T_KV = (jax.random.normal(key, (2, S, K, H)) for key in KEYS[2:4])
SINKS, T_SINKS = jnp.array([0.5, -1.0, 0.0, 2.0]), jnp.array([1.0, 0.3, -0.7, 0.2])
OPTIONS = {"mask": AttentionMask.causal(T, S), "softcap": 2.0}


def gradient(attend, *arrays):
    return jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), argnums=tuple(range(len(arrays))))(*arrays)


def tangent(attend, q, kv):
    return jax.jvp(attend, (q, kv), (T_Q, T_KV))


def mean_flow(attend, q, kv):
    """The gradient of MeanFlow's loss: through the value of a jvp, its tangent held fixed."""

    def loss(weight):
        u, d_u = jax.jvp(lambda q: attend(weight * q, weight * kv), (q,), (T_Q,))
        return jnp.sum((u - jax.lax.stop_gradient(u - 0.3 * d_u)) ** 2 + u**2)

    return jax.grad(loss)(jnp.float32(1.3))


def in_a_scan(derivative, wrap=lambda body: body):
    """Two layers of it, as a model has them."""

    def of(attend, q, kv):
        two = lambda q, kv: jax.lax.scan(wrap(lambda q, _: (attend(q, kv), None)), q, None, length=2)[0]
        return derivative(two, q, kv)

    return of


def of_each_example(attend, q, kv):
    return jax.vmap(functools.partial(gradient, attend))(q[:, None], kv[:, None])


def on_two_devices(derivative):
    def of(attend, q, kv):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        spec = jax.P("data")
        sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        return derivative(sharded, q, kv)

    return of


DERIVATIVES = {"gradient": gradient, "tangent": tangent, "mean flow": mean_flow}
MATRIX = {
    **DERIVATIVES,
    **{f"{name}, scan": in_a_scan(d) for name, d in DERIVATIVES.items()},
    **{f"{name}, scan of remat": in_a_scan(d, jax.remat) for name, d in DERIVATIVES.items()},
    **{f"{name}, shard_map": on_two_devices(d) for name, d in DERIVATIVES.items()},
    "gradient of the queries alone, scan of remat": lambda attend, q, kv: in_a_scan(
        lambda two, q, kv: gradient(lambda q: two(q, kv), q), jax.remat
    )(attend, q, kv),
    "gradient of each example": of_each_example,
    "tangent of each example": lambda attend, q, kv: jax.vmap(
        lambda q, kv, t_q: jax.jvp(lambda q: attend(q, kv), (q,), (t_q,))
    )(q[:, None], kv[:, None], T_Q[:, None]),
}


def derivatives(name, attention, implementation):
    attend = lambda q, kv: attention(q, kv, 0.5 * kv, implementation=implementation, **OPTIONS)
    return jax.tree.leaves(jax.jit(lambda q, kv: MATRIX[name](attend, q, kv))(Q, KV))


@functools.cache
def reference_derivatives(name):
    """The same for both implementations that are compared with it."""
    return derivatives(name, flash_attention, "xla")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", MATRIX)
def test_derivatives_are_those_of_the_reference(name, implementation):
    with backend.interpret_mode():
        found = derivatives(name, flash_attention_jvp, implementation)
    for mine, theirs in zip(found, reference_derivatives(name), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_sinks_have_a_gradient_and_a_tangent(implementation):
    def of(attention, implementation):
        attend = lambda q, sinks: attention(q, KV, KV, sinks=sinks, implementation=implementation, **OPTIONS)
        return *gradient(attend, Q, SINKS), *jax.jvp(attend, (Q, SINKS), (T_Q, T_SINKS))

    with backend.interpret_mode():
        mine = of(flash_attention_jvp, implementation)
    for got, want in zip(mine, of(flash_attention, "xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def kernels_of(function):
    """Names of the kernels in a function of (q, kv), as lowered for an H200, in order."""
    device = jax.sharding.AbstractDevice(device_kind=hardware.H200.device_kind, platform="gpu", num_cores=132)
    attend = functools.partial(flash_attention_jvp, implementation="triton", **OPTIONS)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(lambda q, kv: function(lambda q, kv: attend(q, kv, kv), q, kv)).trace(Q, KV)
        return re.findall(r' name = "(\w+)"', traced.lower(lowering_platforms=("cuda",)).as_text())


def test_each_derivative_runs_the_kernels_it_needs_once():
    forward, backward = "flash_attention_forward", ["flash_attention_backward_dq", "flash_attention_backward_dkv"]
    assert kernels_of(gradient) == [forward, *backward]
    assert kernels_of(tangent) == [forward, "flash_attention_tangent_forward"]
    assert sorted(kernels_of(mean_flow)) == sorted([forward, "flash_attention_tangent_forward", *backward])


@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_a_derivative_of_the_tangent_is_refused(outer):
    """Zeros in its place would be a wrong gradient that nothing shows."""
    t_out = lambda q: tangent(lambda q, kv: flash_attention_jvp(q, kv, kv, implementation="xla"), q, KV)[1].sum()
    with pytest.raises(NotImplementedError, match="apply jax.lax.stop_gradient"):
        outer(t_out)(Q)


def test_bad_arguments_are_refused_in_its_own_name():
    with pytest.raises(ValueError, match="flash_attention_jvp: scale must be a finite number, got inf"):
        flash_attention_jvp(Q, KV, KV, scale=float("inf"))
