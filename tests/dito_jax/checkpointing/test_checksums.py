"""Checksums of checkpoints: every flipped bit is detected, in any sharding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.checkpointing import checksums
from dito_jax.checkpointing.checksums import Damaged, Record, array_checksums, check_sizes, check_values, read_record
from dito_jax.errors import UserError


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
    marks = {array_checksums({name: flipped(leaf, bit)})[name] for bit in range(8 * leaf.nbytes)}
    assert len(marks | {array_checksums({name: leaf})[name]}) == 8 * leaf.nbytes + 1


def test_positions_and_signs_of_zero_and_nan_change_the_checksum():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    changed = [x, x.T, x[::-1], x[:, ::-1], x.at[0, 0].set(-1.0)]
    assert len({array_checksums({"x": y})["x"] for y in changed}) == len(changed)
    odd = [jnp.zeros(3), -jnp.zeros(3), jnp.full(3, jnp.nan), -jnp.full(3, jnp.nan)]
    assert len({array_checksums({"x": y})["x"] for y in odd}) == len(odd)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((8, 1), ("a", "b")), ((2, 4), ("a", "b")), ((1, 8), ("a", "b")), ((2, 4), (("a", "b"),)), ((2, 4), (None, "b"))],
    ids=str,
)
def test_sharding_does_not_count_and_nothing_is_gathered(shape, cut):
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    sharded = {"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P(*cut)))}
    assert array_checksums(sharded) == array_checksums({"x": x})
    text = checksums._digester(x.shape, sharded["x"].sharding).lower(sharded["x"]).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_a_record_has_checksums_of_itself_and_of_the_values(tmp_path):
    record = Record(LEAVES, {"step": 3, "shape": (1, 2)}).wait()
    (tmp_path / "record").mkdir()
    file = tmp_path / "record/record.json"
    file.write_text(json.dumps(record))
    assert read_record(tmp_path) == record and record["metadata"] == {"step": 3, "shape": [1, 2]}
    check_values(LEAVES, record)
    older = {name: [kind, mark[:16]] for name, (kind, mark) in record["arrays"].items()}
    with pytest.raises(UserError, match="checksums of an older dito_jax"):
        check_values(LEAVES, record | {"arrays": older})
    with pytest.raises(Damaged, match="checksum mismatch of int32 and 1 more"):
        check_values(LEAVES | {"int32": LEAVES["int32"] + 1, "number": -LEAVES["number"]}, record)
    file.write_text(json.dumps(record | {"metadata": {"step": 4, "shape": [1, 2]}}))
    with pytest.raises(Damaged, match="its checksum record was changed"):
        read_record(tmp_path)
    for nothing in ("null", "{}", "[]", '{"arrays": {}}', "{"):
        file.write_text(nothing)
        with pytest.raises(Damaged, match="no checksum record|checksum record cannot be read"):
            read_record(tmp_path)
    file.unlink()
    with pytest.raises(Damaged, match="cannot be read"):
        read_record(tmp_path)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_donated_meanwhile_is_still_read_as_it_was(devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("a",))
    x = jax.device_put(jnp.arange(4096.0), jax.NamedSharding(mesh, jax.P("a")))
    wanted, later = array_checksums({"x": x}), checksums.begin_checksums({"x": x})
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    y = step(step(x))
    y.block_until_ready()
    assert later() == wanted != array_checksums({"x": y})


def test_files_that_shrank_or_went_are_named(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    checksums.write_sizes(tmp_path)
    check_sizes(tmp_path)
    (tmp_path / "state/a").write_bytes(b"1234")
    with pytest.raises(Damaged, match="its file state/a has 4 bytes, not 5"):
        check_sizes(tmp_path)
    (tmp_path / "state/a").unlink()
    with pytest.raises(Damaged, match="its file state/a is missing"):
        check_sizes(tmp_path)
    (tmp_path / checksums.FILES).write_text("{")
    check_sizes(tmp_path)
