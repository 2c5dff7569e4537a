"""Reads one step: its record, its identity, its arrays onto any mesh, and the verification of all of it."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing.checksums import check_sizes, check_values, kind, read_record
from dito_jax.checkpointing.failures import CheckpointError, Tell, persistently
from dito_jax.checkpointing.identity import Owner, check_identity, check_own_step
from dito_jax.checkpointing.retention import Verification
from dito_jax.distributed import agree


Read = tuple[dict[str, Any], dict[str, Any]]


def read_state(path: Path, wanted: dict[str, Any], verify: Verification, owner: Owner, tell: Tell) -> Read:
    """(record, arrays) of the step at `path`; a collective, which raises in all processes if one of them cannot read.

    Raises:
      Damaged: the step differs from what was saved.
      CheckpointError: it is of another step, run or model, or it cannot be read at present.
    """
    # Each process reads without Orbax's barriers, in which the others would wait for a process that fails.
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})

    def read() -> tuple[dict[str, Any], str | None, bool, dict[str, Any]]:
        record = read_record(path)
        note = check_identity(path, record, owner)
        _compare(path, record, wanted)
        whole = verify != "off" and check_sizes(path)
        with ocp.Context(multiprocessing_options=alone):
            return record, note, whole, ocp.load(str(path), wanted, checkpointable_name="state")

    record, note, whole, state = persistently(path, read, tell, agree)
    # Without a list of its files, nothing but the checksums shows that they are complete.
    if verify == "full" or verify == "fast" and not agree(whole):
        persistently(path, lambda: check_values(state, record), tell, agree)
    check_own_step(path, state)
    if note is not None:
        tell(note)
    return record, state


def _compare(path: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = {name: kind for name, (kind, _) in record["arrays"].items()}
    for name in [*wanted, *found]:
        there, here = found.get(name, "absent"), kind(wanted.get(name))
        if there != here:
            raise CheckpointError(
                f"{path}: {name} is {there} in this checkpoint and {here} in this config: "
                "use another --run-dir, or the config that the checkpoint was made with."
            )
