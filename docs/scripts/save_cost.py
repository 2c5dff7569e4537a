"""Measures how long a save blocks the training loop, compared with plain Orbax; both alternate in one process.

    python docs/scripts/save_cost.py [MEGABYTES ...] [--repeats 15] [--dir DIR]

A line per size: median seconds until `save` returns, until a training step that overwrites the state has ended after
it, until the checkpoint is on disk, and of a restore; for plain Orbax, for dito_jax with its checksums, and the ratio.
"""

import argparse
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing.checkpoint import Checkpoints


PARTS = ("save returns", "next step ends", "on disk", "restore")
ARRAYS = 64  # of a state; parameters, two moments and an EMA have one shape


def make_state(megabytes: float) -> dict[str, jax.Array]:
    """Arrays of float32 of four shapes, `megabytes` in all."""
    rows = max(1, int(megabytes * 1e6 / ARRAYS / 4 / 256))
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    return {f"array{i}": jax.random.normal(key, (rows + i % 4, 256), jnp.float32) for i, key in enumerate(keys)}


def like(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a restore is given."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@functools.partial(jax.jit, donate_argnums=0)
def step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Overwrites the state in place, if nothing else holds it."""
    return jax.tree.map(lambda leaf: leaf * 0.999, state)


def timed(*parts: Callable[[], Any]) -> list[float]:
    """Seconds from the first call to the end of each."""
    began, ends = time.perf_counter(), []
    for part in parts:
        part()
        ends.append(time.perf_counter() - began)
    return ends


def plain(folder: Path, megabytes: float) -> list[float]:
    """Seconds of each of PARTS with Orbax alone."""
    path, state, begun = folder / "plain", jax.block_until_ready(make_state(megabytes)), []
    in_turn = ocp.options.AsyncOptions(create_directories_asynchronously=False)

    def save() -> None:
        with ocp.Context(async_options=in_turn):
            begun.append(ocp.save_checkpointables_async(str(path), {"state": state}))

    wanted = like(state)
    seconds = timed(save, lambda: jax.block_until_ready(step(state)), lambda: begun[0].result())
    seconds += timed(lambda: jax.block_until_ready(ocp.load(str(path), wanted, checkpointable_name="state")))
    shutil.rmtree(path)
    return seconds


def ours(folder: Path, megabytes: float) -> list[float]:
    """Seconds of each of PARTS with dito_jax."""
    checkpoints, state = Checkpoints(folder / "ours"), jax.block_until_ready(make_state(megabytes))
    wanted = like(state)
    save = lambda: checkpoints.save(1, state, metadata={})
    seconds = timed(save, lambda: jax.block_until_ready(step(state)), checkpoints.wait)
    seconds += timed(lambda: jax.block_until_ready(checkpoints.restore(1, wanted)))
    checkpoints.close()
    shutil.rmtree(folder / "ours")
    return seconds


def compare(folder: Path, megabytes: float, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each of PARTS: (plain Orbax, dito_jax)."""
    found = []
    for number in range(repeats + 1):  # the first is a warm-up
        one, other = (plain, ours) if number % 2 else (ours, plain)
        first, second = one(folder, megabytes), other(folder, megabytes)
        found.append((first, second) if number % 2 else (second, first))
    median = lambda which, part: statistics.median(pair[which][part] for pair in found[1:])
    return {name: (median(0, part), median(1, part)) for part, name in enumerate(PARTS)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=float, nargs="*", default=[2.0, 32.0, 256.0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to write; default: the system's folder for temporary files")
    options = parser.parse_args()
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            figures = compare(Path(folder), megabytes, options.repeats)
        told = [f"{name} {a:.4f} s, {b:.4f} s ({b / a:.2f}x)" for name, (a, b) in figures.items()]
        print(f"{megabytes:g} MB, plain Orbax and dito_jax: " + "; ".join(told), flush=True)


if __name__ == "__main__":
    main()
