"""Checkpoints of two processes: joint saves, and a common earlier step if one process finds a damaged one."""

import json

import pytest


SAVES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from dito_jax import distributed
from dito_jax.checkpointing.checkpoint import Checkpoints, digest
from dito_jax.checkpointing import checkpoint, failures

failures.PAUSES = (0.1, 0.1, 0.1)
distributed.join()
directory, damage = Path(sys.argv[1]), sys.argv[2]
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
sharded, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
make = jax.jit(lambda seed: {"x": jax.random.normal(jax.random.key(seed), (8, 64)), "step": seed},
               out_shardings={"x": sharded, "step": whole})
like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make(0))
checkpoints = Checkpoints(directory)
for step in (1, 2):
    checkpoints.save(step, make(step), metadata={"step": step})
checkpoints.wait()
distributed.agree(True)
if distributed.index() == 1:
    if damage == "bit":
        file = max((directory / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if damage == "cut":
        (directory / "2/record/record.json").write_text("{")
    if damage == "read":
        load = checkpoint.ocp.load
        def fails(path, *arguments, **options):
            if path.endswith("/2"):
                raise ValueError("this process cannot read it")
            return load(path, *arguments, **options)
        checkpoint.ocp.load = fails
    if damage == "passing":
        load, left = checkpoint.ocp.load, [2]
        def sometimes(*arguments, **options):
            if left[0]:
                left[0] -= 1
                raise OSError(5, "Input/output error")
            return load(*arguments, **options)
        checkpoint.ocp.load = sometimes
distributed.agree(True)
told = []
def aside(step, error):
    told.append([checkpoints.set_aside(step, "corrupt").name, str(error)])
step, state = checkpoints.restore_newest(like, aside)
same = jax.jit(lambda a, b: jnp.all(a["x"] == b["x"]) & (a["step"] == b["step"]))(state, make(step))
print("said", json.dumps([step, told, bool(same), checkpoints.steps()]))
checkpoints.close()
"""


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("nothing", []),
        ("passing", []),
        ("bit", ["checksum mismatch of x", "checksum mismatch of x"]),
        ("cut", ["its checksum record cannot be read"] * 2),
        ("read", ["it cannot be read by another process", "it cannot be read: this process cannot read it"]),
    ],
)
def test_all_processes_take_the_same_step(start, finish, tmp_path, damage, words):
    lines = [finish(process, 0)[0].splitlines() for process in start(SAVES, tmp_path, damage, count=2)]
    said = [json.loads(line[5:]) for printed in lines for line in printed if line.startswith("said ")]
    step = 1 if words else 2
    assert len(said) == 2
    for process, (restored, told, same, steps) in enumerate(said):
        assert (restored, same, steps) == (step, True, [1] if words else [1, 2])
        assert len(told) == bool(words)
        if words:
            assert told[0][0] == "2.corrupt" and words[process] in told[0][1]
    assert (tmp_path / "2.corrupt").is_dir() == bool(words)
