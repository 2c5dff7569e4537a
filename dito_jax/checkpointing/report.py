"""Reports for `dito checkpoint`: list, contents, verification (checksums) and save time of checkpoints."""

import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dito_jax.checkpointing.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, set_aside_steps
from dito_jax.checkpointing.retention import CheckpointConfig


COLUMNS = "{:>12}  {:>10}  {:19}  {}"


def listing(checkpoints: Checkpoints) -> str:
    """A table with a line per step: size, time of the save and metrics; then the steps that were set aside."""
    lines = [COLUMNS.format("step", "MB", "saved (UTC)", "metrics")]
    for step in checkpoints.steps():
        try:
            metadata = checkpoints.metadata(step)
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(metadata["time"]))
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in metadata.get("metrics", {}).items())
        except DamagedCheckpoint:
            saved, metrics = "", "damaged"
        lines.append(COLUMNS.format(step, _megabytes(checkpoints.path(step)), saved, metrics).rstrip())
    lines += [
        COLUMNS.format(path.name, _megabytes(path), "", "set aside") for path in set_aside_steps(checkpoints.directory)
    ]
    return "\n".join(lines)


def contents(checkpoints: Checkpoints, step: int) -> str:
    """Every array of a step with its checksum, and the metadata."""
    record = checkpoints.record(step)
    longest = max(map(len, record["arrays"]))
    lines = [f"{name:{longest}}  {checksum}  {kind}" for name, (kind, checksum) in record["arrays"].items()]
    for name, value in record["metadata"].items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def verified(checkpoints: Checkpoints) -> Iterator[tuple[int, str | None]]:
    """Verifies each step: yields (step, None or the error); reads all values, on the CPU or the first GPU."""
    for step in checkpoints.steps():
        try:
            _read(checkpoints, step)
            yield step, None
        except CheckpointError as error:
            yield step, str(error)


def save_cost(checkpoints: Checkpoints, step: int, repeats: int = 5) -> str:
    """Measures how long a save blocks the training loop and how long it takes in total.

    The state of `step` is saved `repeats` times beside the run's checkpoints, and removed; medians without a warm-up.
    """
    state = _read(checkpoints, step)
    waits, totals = [], []
    with tempfile.TemporaryDirectory(dir=checkpoints.directory.parent, prefix=".save_cost") as folder:
        beside = Checkpoints(folder, CheckpointConfig(keep=1))
        for number in range(repeats + 1):
            began = time.perf_counter()
            beside.save(number, state, metadata={})
            waits.append(time.perf_counter() - began)
            beside.wait()
            totals.append(time.perf_counter() - began)
        beside.close()
    wait, total = statistics.median(waits[1:]), statistics.median(totals[1:])
    size = sum(leaf.nbytes for leaf in state.values()) / 1e6
    return (
        f"{size:,.1f} MB on {jax.devices()[0].device_kind}: blocks the training loop {wait:.3f} s "
        f"of {total:.3f} s total save time ({wait / total:.1%}, medians of {repeats})"
    )


def _read(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Reads and verifies all arrays of a step, on one device."""
    place = jax.sharding.SingleDeviceSharding(_reader())
    return checkpoints.restore(
        step, {name: _struct(kind, place) for name, (kind, _) in checkpoints.record(step)["arrays"].items()}
    )


def _struct(kind: str, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The ShapeDtypeStruct that `checksums.kind` describes."""
    dtype, shape = re.fullmatch(r"(\w+)\[([\d,]*)\]", kind).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), np.dtype(dtype), sharding=place)


def _reader() -> jax.Device:
    try:
        return jax.devices("cpu")[0]  # it has the most memory
    except RuntimeError:  # JAX_PLATFORMS=cuda
        return jax.devices()[0]


def _megabytes(path: Path) -> str:
    return f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6:.1f}"
