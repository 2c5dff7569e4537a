"""Whether what was read is what was written: a fingerprint of every array, and a record that vouches for itself.

A flipped bit in a checkpoint is read without a complaint, as another number. So each save records a fingerprint of
every array, taken on the devices before any copy of it is made, and a restore takes it again, of what it has put on
the devices, however the arrays lie on them.
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
    """What was read is not what was written; the message says how it shows."""


def fingerprints(leaves: Leaves) -> dict[str, str]:
    """Of each array 32 hex digits, which depend on its bits and their places, not on its sharding: its state_digest.

    Arrays of any process or sharding; every process gets all.
    """
    return begin_fingerprints(leaves)()


def begin_fingerprints(leaves: Leaves) -> Callable[[], dict[str, str]]:
    """`fingerprints` for another thread to wait for; the arrays may be donated meanwhile."""
    # A call for each array: most shapes come four times (parameters, two moments, average), and are compiled once.
    compute = lambda leaves: {name: _digest(leaf) for name, leaf in leaves.items()}
    hexadecimal = lambda sums: {
        name: "".join(f"{int(word):08x}" for word in words) for name, words in jax.device_get(sums).items()
    }
    if jax.process_count() == 1 and all(_on_cpu(leaf) for leaf in leaves.values()):
        # A CPU computes where it is called. It may read the old values later: who donates them gets a copy then.
        aliases = {name: _alias(leaf) for name, leaf in leaves.items()}
        return lambda: hexadecimal(compute(aliases))
    sums = compute(leaves)  # queued on the devices, before whatever takes the arrays' memory
    return lambda: hexadecimal(sums)


def kind(leaf: Any) -> str:
    """float32[3,4] for an array or what stands for one; "absent" for None."""
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


class Record:
    """Says what a checkpoint holds: {"arrays": {path: [kind, fingerprint]}, "metadata", "sha256"}, as JSON.

    Orbax saves it beside the arrays, and waits for their fingerprints in the background.
    """

    def __init__(self, leaves: Leaves, metadata: dict[str, Any]):
        self._kinds = {name: kind(leaf) for name, leaf in leaves.items()}
        self._marks, self._metadata = begin_fingerprints(leaves), metadata

    def made(self) -> dict[str, Any]:
        """The record; waits."""
        marks = self._marks()
        arrays = {name: [kind, marks[name]] for name, kind in self._kinds.items()}
        # As a reader will find it: JSON has no tuples, and no integers as keys.
        record = json.loads(json.dumps({"arrays": arrays, "metadata": self._metadata}))
        return record | {"sha256": _sha256(record)}

    async def save(self, directory: Any) -> Awaitable[None]:
        """Orbax's protocol for what saves itself: what it returns is done in the background."""

        async def write() -> None:
            folder = await directory.await_creation()
            record = await asyncio.to_thread(self.made)
            if jax.process_index() == 0:
                (Path(folder) / RECORD.name).write_text(json.dumps(record))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Nothing loads it through Orbax; `read_record` does."""
        raise NotImplementedError


def read_record(step: Path) -> dict[str, Any]:
    """The record in a step's directory, if it is as it was made; else raises Damaged."""
    try:
        record = json.loads((step / RECORD).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise Damaged("the record of its contents cannot be read") from error
    if not isinstance(record, dict) or "sha256" not in record:
        raise Damaged("it has no record of its contents")
    told = {name: value for name, value in record.items() if name != "sha256"}
    if _sha256(told) != record["sha256"]:
        raise Damaged("the record of its contents was changed")
    return record


def check_values(leaves: Leaves, record: dict[str, Any]) -> None:
    """Raises Damaged if an array is not, bit for bit, what the record says.

    Raises:
      UserError: fingerprints of the record are of another kind, so that nothing can be said.
    """
    marks = fingerprints(leaves)
    if any(len(mark) != len(next(iter(marks.values()))) for _, mark in record["arrays"].values()):
        raise UserError("the checkpoint's fingerprints are those of an older dito_jax: go on with that, or start anew.")
    wrong = [name for name, leaf in leaves.items() if [kind(leaf), marks[name]] != record["arrays"].get(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"the values of {wrong[0]}{more} are not those that were saved")


def write_sizes(directory: Path) -> None:
    """Records how large each file is, in files.json among them."""
    unfinished = directory / f".{FILES}"
    unfinished.write_text(json.dumps(_sizes(directory)))
    unfinished.replace(directory / FILES)


def check_sizes(directory: Path) -> None:
    """Raises Damaged if a file is missing or of another size; nothing where sizes were not recorded."""
    try:
        recorded = json.loads((directory / FILES).read_text())
    except (FileNotFoundError, ValueError):
        return
    found = _sizes(directory)
    for name, size in recorded.items():
        if name not in found:
            raise Damaged(f"its file {name} is missing")
        if found[name] != size:
            raise Damaged(f"its file {name} has {found[name]:,} bytes, not {size:,}")


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in (FILES, f".{FILES}"))
    return {os.fspath(path.relative_to(directory)): path.stat().st_size for path in sorted(files)}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _on_cpu(leaf: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _alias(leaf: jax.Array) -> jax.Array:
    """The same memory of a CPU as another array."""
    shards = [jax.device_put(np.asarray(shard.data), shard.device, may_alias=True) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _digest(leaf: jax.Array) -> jax.Array:
    """state_digest's four words of the whole array, on every device."""
    return _digester(leaf.shape, leaf.sharding)(leaf)


@functools.cache
def _digester(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Compiled for arrays that lie so: each device takes the digest of its piece, and digests of pieces add up."""
    if not isinstance(sharding, jax.NamedSharding):
        return jax.jit(state_digest)
    cut = axes_of(sharding)
    of_piece = lambda x: jax.lax.psum(piece_digest(x, shape, sharding), cut)
    whole = jax.P()
    return jax.jit(
        jax.shard_map(of_piece, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=whole, check_vma=False)
    )


def piece_digest(x: jax.Array, shape: tuple[int, ...], sharding: jax.NamedSharding) -> jax.Array:
    """Inside shard_map: the digest of a device's piece of an array of this shape, by its place in the whole."""
    if not shape:
        return state_digest(x)
    start = piece_start(sharding.spec, x.shape)
    return state_digest(x, start=start, whole=shape)


def axes_of(sharding: jax.NamedSharding) -> tuple[str, ...]:
    """The mesh axes by which an array is cut."""
    entries = (axes for axes in sharding.spec if axes is not None)
    return tuple(axis for axes in entries for axis in ((axes,) if isinstance(axes, str) else axes))
