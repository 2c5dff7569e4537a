"""`dito checkpoint verify` checks every value, also where the run itself does not."""

import dataclasses

import jax

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.config import load, to_json
from dito_jax.telemetry.run_directory import RunDirectory


def test_verify_checks_every_value_whatever_the_run_checks(dito, tmp_path):
    run, config = RunDirectory(tmp_path), load("digits")
    run.write_text("config.json", to_json(dataclasses.replace(config, checkpoint=CheckpointConfig(verify="off"))))
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(1, {"x": jax.random.bits(jax.random.key(0), (4096,))}, metadata={})  # they do not compress
    checkpoints.close()
    assert dito("checkpoint", "verify", str(tmp_path))[:2] == (0, "step 1: good\n")
    data = max((run.checkpoints / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    code, out, err = dito("checkpoint", "verify", str(tmp_path))
    assert code == 2 and "damaged (checksum mismatch of x)" in out and "1 of 1 checkpoints are not good" in err
