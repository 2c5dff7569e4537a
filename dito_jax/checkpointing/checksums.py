"""Checksums of checkpoints: one of every array, verified on restore, in a record with its own checksum.

Without a checksum a flipped bit in a checkpoint is read as another number, without an error. So each save records a
checksum of every array, computed on the devices before the array is copied. A restore computes it again from the
arrays on the devices; it does not depend on their sharding.
"""

import asyncio
import functools
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dito_jax.errors import UserError
from dito_jax.sharding import piece_start
from kernels_pallas import state_digest


FILES = "files.json"
RECORD = Path("record/record.json")
Leaves = Mapping[str, Any]  # arrays by their path in the state


class Damaged(Exception):
    """A checkpoint that differs from what was saved; the message says how."""


def array_checksums(leaves: Leaves) -> dict[str, str]:
    """The state_digest of each array as 32 hex digits; it depends on all bits and their positions, not on the sharding.

    A collective for arrays sharded over several processes; every process gets all checksums.
    """
    return begin_checksums(leaves)()


def begin_checksums(leaves: Leaves) -> Callable[[], dict[str, str]]:
    """Starts `array_checksums`; call the result, in any thread, to wait for it. The arrays may be donated meanwhile."""
    # One call per array: most shapes occur four times (parameters, two moments, EMA) and are compiled once.
    compute = lambda leaves: {name: _digest(leaf) for name, leaf in leaves.items()}
    hexadecimal = lambda sums: {
        name: "".join(f"{int(word):08x}" for word in words) for name, words in jax.device_get(sums).items()
    }
    if jax.process_count() == 1 and all(_on_cpu(leaf) for leaf in leaves.values()):
        # On CPUs the computation runs in the thread that waits, on aliases: a donation of the arrays then copies them.
        aliases = {name: _alias(leaf) for name, leaf in leaves.items()}
        return lambda: hexadecimal(compute({name: alias() for name, alias in aliases.items()}))
    sums = compute(leaves)  # queued on the devices before any computation that donates the arrays
    return lambda: hexadecimal(sums)


def kind(leaf: Any) -> str:
    """Dtype and shape of an array or ShapeDtypeStruct as text, e.g. float32[3,4]; "absent" for None."""
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


class Record:
    """The record of a checkpoint as JSON: {"arrays": {path: [kind, checksum]}, "metadata", "sha256" of the record}.

    `parts` are further entries. Orbax saves it beside the arrays; the checksums are awaited in the background.
    """

    def __init__(self, leaves: Leaves, metadata: dict[str, Any], **parts: Any):
        self._kinds = {name: kind(leaf) for name, leaf in leaves.items()}
        self._checksums, self._rest = begin_checksums(leaves), {"metadata": metadata} | parts

    def wait(self) -> dict[str, Any]:
        """Waits for the checksums; returns the record."""
        found = self._checksums()
        arrays = {name: [kind, found[name]] for name, kind in self._kinds.items()}
        # Through JSON, which has no tuples and no integer keys, so that the SHA-256 is that of what is read back.
        record = json.loads(json.dumps({"arrays": arrays} | self._rest))
        return record | {"sha256": _sha256(record)}

    async def save(self, directory: Any) -> Awaitable[None]:
        """Orbax's protocol for custom objects: the returned awaitable runs in the background."""

        async def write() -> None:
            folder = await directory.await_creation()
            record = await asyncio.to_thread(self.wait)
            if jax.process_index() == 0:
                (Path(folder) / RECORD.name).write_text(json.dumps(record))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Not implemented: `read_record` reads the record without Orbax."""
        raise NotImplementedError


def saved_steps(directory: Path) -> list[int]:
    """All completely saved steps in the directory of a run's checkpoints, ascending."""
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)


def read_record(step: Path) -> dict[str, Any]:
    """Reads and verifies the record in a step's directory.

    Raises:
      Damaged: the record is missing or no JSON, or its SHA-256 is wrong.
      OSError: it cannot be read at present.
    """
    try:
        record = json.loads((step / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise Damaged("its checksum record cannot be read") from error
    if not isinstance(record, dict) or "sha256" not in record:
        raise Damaged("it has no checksum record")
    contents = {name: value for name, value in record.items() if name != "sha256"}
    if _sha256(contents) != record["sha256"]:
        raise Damaged("its checksum record was changed")
    return record


def check_values(leaves: Leaves, record: dict[str, Any]) -> None:
    """Verifies the checksum of every array.

    Raises:
      Damaged: an array differs from what was saved.
      UserError: the checksums were written by an older version in another format, so they cannot be compared.
    """
    found = array_checksums(leaves)
    if any(len(checksum) != len(next(iter(found.values()))) for _, checksum in record["arrays"].values()):
        raise UserError(
            "the checkpoint has checksums of an older dito_jax: continue with that version, or start a new run."
        )
    wrong = [name for name, leaf in leaves.items() if [kind(leaf), found[name]] != record["arrays"].get(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"checksum mismatch of {wrong[0]}{more}")


def write_sizes(directory: Path) -> None:
    """Writes files.json with the size of each file in the directory."""
    unfinished = directory / f".{FILES}"
    unfinished.write_text(json.dumps(_sizes(directory)))
    unfinished.replace(directory / FILES)


def check_sizes(directory: Path) -> bool:
    """Raises Damaged if a file is missing or has another size; False if that is unknown, without files.json."""
    try:
        recorded = json.loads((directory / FILES).read_text())
    except (FileNotFoundError, ValueError):
        return False
    found = _sizes(directory)
    for name, size in recorded.items():
        if name not in found:
            raise Damaged(f"its file {name} is missing")
        if found[name] != size:
            raise Damaged(f"its file {name} has {found[name]:,} bytes, not {size:,}")
    return True


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in (FILES, f".{FILES}"))
    return {os.fspath(path.relative_to(directory)): path.stat().st_size for path in sorted(files)}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _on_cpu(leaf: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _alias(leaf: jax.Array) -> Callable[[], jax.Array]:
    """Makes, when called in any thread, another array that shares the CPU memory of `leaf`, which may be donated."""
    shape, sharding = leaf.shape, leaf.sharding
    views = [(np.asarray(shard.data), shard.device) for shard in leaf.addressable_shards]  # each holds the memory

    def array() -> jax.Array:
        shards = [jax.device_put(view, device, may_alias=True) for view, device in views]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return array


def _digest(leaf: jax.Array) -> jax.Array:
    """The four words of the state_digest of the whole array, on every device."""
    return _digester(leaf.shape, leaf.sharding)(leaf)


@functools.cache
def _digester(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Compiled digest for one shape and sharding: each device digests its shard, the results are summed."""
    if not isinstance(sharding, jax.NamedSharding):
        return jax.jit(state_digest)
    cut = axes_of(sharding)
    of_piece = lambda x: jax.lax.psum(piece_digest(x, shape, sharding), cut)
    whole = jax.P()
    return jax.jit(
        jax.shard_map(of_piece, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=whole, check_vma=False)
    )


def piece_digest(x: jax.Array, shape: tuple[int, ...], sharding: jax.NamedSharding) -> jax.Array:
    """Inside shard_map: the digest of this device's shard of an array of shape `shape`, by its position."""
    if not shape:
        return state_digest(x)
    start = piece_start(sharding.spec, x.shape)
    return state_digest(x, start=start, whole=shape)


def axes_of(sharding: jax.NamedSharding) -> tuple[str, ...]:
    """The mesh axes that shard an array."""
    entries = (axes for axes in sharding.spec if axes is not None)
    return tuple(axis for axes in entries for axis in ((axes,) if isinstance(axes, str) else axes))
