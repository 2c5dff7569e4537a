"""What is particular to queries and keys: the definition against the formula, what a Rotation is, one-line errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Rotation, qk_norm_rope


pytestmark = pytest.mark.recorded


B, T, K, M, H = 2, 6, 2, 5, 12


def arrays(H=H):
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = jax.random.normal(keys[0], (B, T, K, M, H))
    return qkv, *(jax.random.normal(k, (H,)) + 1 for k in keys[1:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_the_formula(interleaved):
    """Pair by pair with complex numbers, in float64."""
    qkv, *weights = arrays()
    rotation = Rotation.of(jnp.arange(T)[None, :, None], (H,))
    got = qk_norm_rope(qkv, *weights, rotation, interleaved=interleaved, eps=0.1, implementation="xla")
    wide = np.asarray(qkv, np.float64)
    turn = np.exp(1j * np.arange(T)[:, None] * 1e4 ** (-np.arange(H // 2) / (H // 2)))
    for n in range(K * (M - 2) + K):
        head, member = divmod(n, M - 2) if n < K * (M - 2) else (n - K * (M - 2), M - 2)
        x, weight = wide[:, :, head, member], np.asarray(weights[int(member == M - 2)], np.float64)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) * weight
        first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : H // 2], x[..., H // 2 :])
        turned = (first + 1j * second) * turn
        mine = np.asarray(got[0][:, :, n] if member < M - 2 else got[1][:, :, head])
        first, second = (mine[..., ::2], mine[..., 1::2]) if interleaved else (mine[..., : H // 2], mine[..., H // 2 :])
        np.testing.assert_allclose(first, turned.real, atol=5e-6)  # angles up to 5 in float32
        np.testing.assert_allclose(second, turned.imag, atol=5e-6)
    np.testing.assert_array_equal(got[2], qkv[..., -1, :])


def test_without_weights_and_rotation_it_only_splits():
    qkv, *_ = arrays()
    q, k, v = qk_norm_rope(qkv)
    np.testing.assert_array_equal(q.reshape(B, T, K, M - 2, H), qkv[..., :-2, :])
    np.testing.assert_array_equal(jnp.stack([k, v], axis=3), qkv[..., -2:, :])


@pytest.mark.parametrize("sides", [(12,), (3, 4), (2, 3, 4)], ids=str)
def test_products_of_turned_vectors_depend_on_distance_alone(sides):
    """On a line, an image and a video: the defining property, equation 11 of RoFormer."""
    qkv, q_weight, k_weight = arrays(24)
    count = np.prod(sides)
    same = jnp.broadcast_to(qkv[:1, :1], (1, count, *qkv.shape[2:]))  # one query and one key everywhere
    q, k, _ = qk_norm_rope(same, q_weight, k_weight, Rotation.grid(sides, 24))
    products = np.einsum("th,sh->ts", q[0, :, 0], k[0, :, 0])
    at = np.stack(np.unravel_index(np.arange(count), sides), axis=-1)
    by_distance = {}
    for t, s in np.ndindex(count, count):
        by_distance.setdefault(tuple(at[t] - at[s]), []).append(products[t, s])
    assert len(by_distance) == np.prod([2 * side - 1 for side in sides])
    spread = max(max(values) - min(values) for values in by_distance.values())
    assert spread < 1e-5 < np.ptp([values[0] for values in by_distance.values()]) / 10


def test_axes_turn_their_own_elements():
    """As FLUX has it: 4 elements by the first axis, 8 by the second; a position on one leaves the other's alone."""
    qkv, *_ = arrays()
    positions = jnp.array([[[0, 0], [3, 0], [0, 5], [0, 0], [1, 1], [0, 0]]])
    q, _, _ = qk_norm_rope(qkv, rotation=Rotation.of(positions, (4, 8)), interleaved=True)
    moved = np.asarray(q.reshape(B, T, -1, H) != qkv[..., :-2, :].reshape(B, T, -1, H)).any(axis=(0, 2))
    np.testing.assert_array_equal(moved, [[0] * 12, [1] * 4 + [0] * 8, [0] * 4 + [1] * 8, [0] * 12, [1] * 12, [0] * 12])


def test_a_prefix_stays_as_it_is():
    bare, prefixed = Rotation.grid((2, 2), 24), Rotation.grid((2, 2), 24, prefix=2)
    np.testing.assert_array_equal(prefixed.cos[:, :2], 1)
    np.testing.assert_array_equal(prefixed.sin[:, :2], 0)
    np.testing.assert_array_equal(prefixed.sin[:, 2:], bare.sin)


def test_theta_is_the_longest_period_by_two_pi():
    slow = Rotation.of(jnp.array([[[1.0]]]), (4,), theta=100.0)
    np.testing.assert_allclose(slow.sin[0, 0], np.sin([1.0, 0.1]), rtol=1e-6)


def test_the_rotation_is_a_constant():
    qkv, *weights = arrays()
    rotation = Rotation.grid((T,), H)
    gradient = jax.grad(lambda r: sum(jnp.sum(x**3) for x in qk_norm_rope(qkv, *weights, r)))(rotation)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(qkv=jnp.zeros((2, 6, 2, 2, 12))), r"qkv is \(2, 6, 2, 2, 12\); give it as \(B, T, K, M, H\)"),
        (dict(qkv=jnp.zeros((2, 6, 2, 12))), r"qkv is \(2, 6, 2, 12\); give it as \(B, T, K, M, H\)"),
        (dict(qkv=jnp.zeros((2, 6, 2, 5, 13))), "an even H"),
        (dict(q_weight=None), r"weights \[None, \(12,\)\] do not fit H = 12; give both as \(H,\), or neither"),
        (dict(k_weight=jnp.zeros(6)), r"weights \[\(12,\), \(6,\)\] do not fit"),
        (dict(rotation=Rotation.grid((7,), 12)), r"rotation of \(1, 7, 6\) .*give it as \(B, T, H/2\) = \(2, 6, 6\)"),
        (dict(rotation=Rotation.grid((6,), 24)), r"rotation of \(1, 6, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, words, unchecked_arrays):
    qkv, q_weight, k_weight = arrays()
    given = dict(qkv=qkv, q_weight=q_weight, k_weight=k_weight, rotation=None) | change
    with pytest.raises(ValueError, match=f"^qk_norm_rope: .*{words}"):
        qk_norm_rope(**given)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Rotation.of(jnp.zeros((1, 6, 2)), (4,)), r"widths \(4,\) do not fit positions \(1, 6, 2\)"),
        (lambda: Rotation.of(jnp.zeros((1, 6, 2)), (4, 3)), "an even number for each of 2 axes"),
        (lambda: Rotation.grid((2, 2, 2), 4), "3 axes need an even head of 6 or more, got 4"),
        (lambda: Rotation.grid((2,), 5), "1 axes need an even head of 2 or more, got 5"),
    ],
)
def test_impossible_rotations_are_refused_in_one_line(make, words):
    with pytest.raises(ValueError, match=f"^Rotation: .*{words}"):
        make()
