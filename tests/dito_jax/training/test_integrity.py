"""What was read is told from what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.training import integrity
from dito_jax.training.integrity import Damaged, check_record, check_sizes, check_values, fingerprints, make_record


LEAVES = {
    "float32": jax.random.normal(jax.random.key(0), (5, 7, 3)),
    "bfloat16": jax.random.normal(jax.random.key(1), (64,)).astype(jnp.bfloat16),
    "int32": jnp.arange(-5, 5, dtype=jnp.int32),
    "bool": jnp.array([True, False, True]),
    "number": jnp.float32(3.0),
}


def flipped(array, bit: int):
    raw = bytearray(np.asarray(array).tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return jnp.asarray(np.frombuffer(bytes(raw), np.asarray(array).dtype).reshape(array.shape))


@pytest.mark.parametrize("name", [name for name in LEAVES if name != "bool"])
def test_every_single_bit_shows(name):
    leaf = LEAVES[name]
    marks = {fingerprints({name: flipped(leaf, bit)})[name] for bit in range(8 * leaf.nbytes)}
    assert len(marks | {fingerprints({name: leaf})[name]}) == 8 * leaf.nbytes + 1


def test_places_count_and_so_do_signs_of_zero_and_of_nan():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    changed = [x, x.T, x[::-1], x[:, ::-1], x.at[0, 0].set(-1.0)]
    assert len({fingerprints({"x": y})["x"] for y in changed}) == len(changed)
    odd = [jnp.zeros(3), -jnp.zeros(3), jnp.full(3, jnp.nan), -jnp.full(3, jnp.nan)]
    assert len({fingerprints({"x": y})["x"] for y in odd}) == len(odd)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_sharding_does_not_count_and_nothing_is_gathered(shape):
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    sharded = {"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P("a", "b")))}
    assert fingerprints(sharded) == fingerprints({"x": x})
    text = integrity._lanes.lower(sharded["x"]).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_a_record_vouches_for_itself_and_for_the_values():
    record = make_record(LEAVES, {"step": 3, "shape": (1, 2)})
    assert check_record(record) is record and record["metadata"] == {"step": 3, "shape": [1, 2]}
    check_values(LEAVES, record)
    with pytest.raises(Damaged, match="values of int32 and 1 more are not those"):
        check_values(LEAVES | {"int32": LEAVES["int32"] + 1, "number": -LEAVES["number"]}, record)
    with pytest.raises(Damaged, match="record of its contents was changed"):
        check_record(record | {"metadata": {"step": 4, "shape": [1, 2]}})
    for nothing in (None, {}, [], {"arrays": {}}):
        with pytest.raises(Damaged, match="no record"):
            check_record(nothing)


def test_files_that_shrank_or_went_are_named(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    integrity.write_sizes(tmp_path)
    check_sizes(tmp_path)
    (tmp_path / "state/a").write_bytes(b"1234")
    with pytest.raises(Damaged, match="its file state/a has 4 bytes, not 5"):
        check_sizes(tmp_path)
    (tmp_path / "state/a").unlink()
    with pytest.raises(Damaged, match="its file state/a is missing"):
        check_sizes(tmp_path)
    (tmp_path / integrity.FILES).write_text("{")
    check_sizes(tmp_path)
