"""Ops against float64 oracles in NumPy, written from their definitions, on random problems: values and gradients.

A gradient is compared along one random direction with a central difference of the oracle. 20 examples run always, 2,000
with --everything.
"""

import functools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import kernels_pallas as kp
from kernels_pallas import AttentionMask, backend


def softmax(scores):
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def activated(x, activation):
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Problems: each function draws (arrays, call of the op, oracle), where both take the arrays and return one array.


def attention(draw, rng, on):
    B, S, K, G, H = (draw(st.sampled_from(x)) for x in ((1, 2), (9, 17), (1, 2), (1, 2), (8, 16)))
    kind, cap = (
        draw(st.sampled_from(["none", "causal", "window", "padding", "packed"])),
        draw(st.sampled_from([None, 2.0])),
    )
    position = np.arange(S)
    distance = position[:, None] - position[None, :]
    left, lengths = int(rng.integers(0, S)), rng.integers(0, S + 1, B)
    documents = np.sort(rng.integers(-1, 3, (B, S)), axis=1)
    seen = {
        "none": np.ones((1, S, S), bool),
        "causal": (distance >= 0)[None],
        "window": ((distance >= 0) & (distance <= left))[None],
        "padding": np.broadcast_to(position < lengths[:, None, None], (B, S, S)),
        "packed": (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None],
    }[kind]
    mask = {
        "none": lambda: None,
        "causal": lambda: AttentionMask.causal(S),
        "window": lambda: AttentionMask.sliding_window(S, left=left),
        "padding": lambda: AttentionMask.padding(lengths, S),
        "packed": lambda: AttentionMask.packed(documents),
    }[kind]()

    def oracle(q, k, v):
        k, v = (np.repeat(x, G, axis=2) for x in (k, v))
        score = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
        score = score if cap is None else cap * np.tanh(score / cap)
        return np.einsum("bnts,bsnh->btnh", softmax(np.where(seen[:, None], score, -np.inf)), v)

    call = lambda mask, q, k, v: kp.flash_attention(q, k, v, mask=mask, softcap=cap, **on)
    return [(B, S, K * G, H), (B, S, K, H), (B, S, K, H)], (call, mask), oracle


def norm(draw, rng, on):
    kind, D, many = (draw(st.sampled_from(x)) for x in (("layer", "rms"), (8, 24), (False, True)))

    def oracle(x, scale, shift, weight):
        centred = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
        y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
        scale, shift = (a if many else a[:, None] for a in (scale, shift))
        return y * weight * (1 + scale) + shift

    call = lambda _, x, scale, shift, weight: kp.modulated_norm(x, scale, shift, weight=weight, kind=kind, **on)
    modulation = (2, 5, D) if many else (2, D)
    return [(2, 5, D), modulation, modulation, (D,)], (call, None), oracle


def mlp(draw, rng, on):
    activation, R = draw(st.sampled_from(["silu", "gelu_tanh"])), draw(st.sampled_from([3, 18]))

    def oracle(x, w_gate_up, w_down):
        return (activated(x @ w_gate_up[:, 0], activation) * (x @ w_gate_up[:, 1])) @ w_down

    call = lambda _, *arrays: kp.gated_mlp(*arrays, activation=activation, **on)
    return [(R, 8), (8, 2, 12), (12, 8)], (call, None), oracle


def loss(draw, rng, on):
    R, V, z, cap = (draw(st.sampled_from(x)) for x in ((3, 17), (5, 40), (0.0, 0.1), (None, 3.0)))
    labels = np.where(rng.random(R) < 0.3, -100, rng.integers(0, V, R))

    def oracle(x, w):
        logits = x @ w if cap is None else cap * np.tanh(x @ w / cap)
        lse = np.log(np.exp(logits).sum(axis=1))
        return np.where(labels < 0, 0, lse - logits[np.arange(R), np.maximum(labels, 0)] + z * lse**2)

    call = lambda labels, x, w: kp.linear_cross_entropy(x, w, labels, z_loss=z, logit_softcap=cap, **on)[0]
    return [(R, 8), (8, V)], (call, labels.astype(np.int32)), oracle


def rotary(draw, rng, on):
    interleaved, T = draw(st.booleans()), draw(st.sampled_from([3, 10]))
    positions = rng.integers(0, 50, (1, T, 1))
    angle = positions * 1e4 ** (-np.arange(4) / 4)
    cos, sin = (f(angle)[:, :, None, None] for f in (np.cos, np.sin))

    def oracle(qkv, q_weight, k_weight):
        weight = np.stack([q_weight, q_weight, k_weight])
        y = qkv[..., :3, :] / np.sqrt((qkv[..., :3, :] ** 2).mean(axis=-1, keepdims=True) + 1e-6) * weight
        a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else (y[..., :4], y[..., 4:])
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = np.stack([a, b], axis=-1).reshape(y.shape) if interleaved else np.concatenate([a, b], axis=-1)
        return np.concatenate([turned, qkv[..., 3:, :]], axis=-2)

    def call(positions, qkv, *weights):
        q, k, v = kp.qk_norm_rope(qkv, *weights, kp.Rotation.of(positions, (8,)), interleaved=interleaved, **on)
        return jnp.concatenate([q.reshape(*qkv.shape[:3], 2, 8), k[:, :, :, None], v[:, :, :, None]], axis=3)

    return [(2, T, 2, 4, 8), (8,), (8,)], (call, positions.astype(np.int32)), oracle


def experts(draw, rng, on):
    E, k, T = (draw(st.sampled_from(x)) for x in ((3, 4), (1, 2), (5, 20)))
    sigmoid, logits = draw(st.booleans()), rng.standard_normal((T, E)) * 3
    score = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    chosen = np.argsort(-score, axis=1, kind="stable")[:, :k]
    weight = np.take_along_axis(score, chosen, axis=1)
    weight = weight / weight.sum(axis=1, keepdims=True)

    def oracle(x, w_gate_up, w_down):
        out = np.zeros_like(x)
        for t in range(T):
            for e, share in zip(chosen[t], weight[t], strict=True):
                gate, up = np.split(x[t] @ w_gate_up[e], 2)
                out[t] += share * (activated(gate, "silu") * up) @ w_down[e]
        return out

    def call(logits, *arrays):
        if sigmoid:
            assignments = kp.top_k_sigmoid(logits, jnp.zeros(E), active=k)
        else:
            assignments = kp.top_k_softmax(logits, active=k, normalize=True)
        return kp.expert_mlp(arrays[0], assignments.route(), *arrays[1:], **on)

    return [(T, 8), (E, 8, 12), (E, 6, 8)], (call, logits.astype(np.float32)), oracle


def grouped(draw, rng, on):
    R, E = draw(st.sampled_from([6, 30])), 4
    sizes = np.diff(np.sort(rng.integers(0, R + 1, E)), prepend=0)
    expert = np.repeat(np.arange(E), sizes)

    def oracle(x, w):
        y = np.einsum("rd,rdf->rf", x[: len(expert)], w[expert])
        return np.concatenate([y, np.zeros((R - len(expert), w.shape[2]))])

    return (
        [(R, 8), (E, 8, 12)],
        (lambda sizes, x, w: kp.grouped_matmul(x, w, sizes, **on), sizes.astype(np.int32)),
        oracle,
    )


def cache(draw, rng, on):
    lengths = rng.integers(0, 21, 2)

    def oracle(q, k, v):
        k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
        score = np.einsum("bnh,bsnh->bns", q, k) / 4
        exists = np.arange(20) < lengths[:, None, None]
        return np.einsum("bns,bsnh->bnh", softmax(np.where(exists, score, -np.inf)), v)

    call = lambda lengths, *arrays: kp.decode_attention(*arrays, lengths, **on)
    return [(2, 4, 16), (2, 20, 2, 16), (2, 20, 2, 16)], (call, lengths.astype(np.int32)), oracle


PROBLEMS = (attention, norm, mlp, loss, rotary, experts, grouped, cache)


def check(data, implementations):
    problem = data.draw(st.sampled_from(PROBLEMS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    on = {"implementation": data.draw(st.sampled_from(implementations))}
    shapes, (call, constant), oracle = problem(data.draw, rng, on)
    arrays, ways = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    arrays, ways = ([x.astype(np.float32).astype(np.float64) for x in xs] for xs in (arrays, ways))
    want = oracle(*arrays)
    pull = rng.standard_normal(want.shape)

    def passes(constant, arrays, pull) -> Any:
        out, vjp = jax.vjp(functools.partial(call, constant), *arrays)
        return out, vjp(pull)

    narrow = [jnp.asarray(x, jnp.float32) for x in arrays]
    with backend.interpret_mode():
        out, gradients = jax.jit(passes)(constant, narrow, jnp.asarray(pull, jnp.float32))
    np.testing.assert_allclose(out, want, atol=3e-5 * max(np.abs(want).max(), 1))
    step = 1e-6
    moved = [oracle(*[x + sign * step * w for x, w in zip(arrays, ways, strict=True)]) for sign in (1, -1)]
    slope = np.sum((moved[0] - moved[1]) * pull) / (2 * step)
    terms = [np.asarray(g, np.float64) * w for g, w in zip(gradients, ways, strict=True)]
    size = sum(np.abs(t).sum() for t in terms)
    np.testing.assert_allclose(sum(t.sum() for t in terms), slope, atol=1e-4 * max(size, 1))


OPTIONS: dict[str, Any] = dict(
    deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow("compiles a program for each of 20 random problems")
@settings(max_examples=20, derandomize=True, **OPTIONS)
@given(data=st.data())
def test_random_problems(data):
    check(data, ["xla"])


@pytest.mark.exhaustive("2,000 random problems")
def test_many_random_problems():
    settings(max_examples=2000, **OPTIONS)(given(data=st.data())(lambda data: check(data, ["xla", "xla", "triton"])))()
