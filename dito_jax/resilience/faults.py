"""Faults on demand, for drills and tests: `--faults.inject kill@120 hang@50#1 nan-grad@80`.

    kind@step[#process][!][:value]

Without #process it strikes process 0. With ! at every start of the run that comes to the step, else once in a run:
RUN/faults.jsonl has each strike before it strikes. Kinds:

    kill term crash hang freeze   SIGKILL, SIGTERM, an exception, a sleep without end, SIGSTOP: before the step
    slow-rank                     sleeps `value` seconds (0.5) in every step from that one on
    dead                          SIGKILL at the step, and at every start after it; #n is a place, $DITO_PLACE
    nan-grad spike transient-nan  the images of the step are NaN; times `value` (100); NaN unless the step is run again
    bitflip-copy                  a bit of the last device's copy of the first parameter, in memory, before the step
    bitflip-ckpt truncate-ckpt delete-ckpt   damages the largest file of the checkpoint of the step, once it is written
    disk-full                     from the save of the step on, no file may grow beyond 4,096 bytes
"""

import dataclasses
import difflib
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dito_jax.errors import UserError
from dito_jax.telemetry.run_directory import RunDirectory, json_lines


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "freeze": signal.SIGSTOP}
STOPS = (*SIGNALS, "crash", "hang")
POISONS = ("nan-grad", "spike", "transient-nan")
DAMAGES = ("bitflip-ckpt", "truncate-ckpt", "delete-ckpt")
KINDS = (*STOPS, "slow-rank", "dead", *POISONS, *DAMAGES, "bitflip-copy", "disk-full")
FULL = 4096  # bytes that a file may have on a full disk
GRAMMAR = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d+)(#(?P<process>\d+))?(?P<always>!)?(:(?P<value>\d+(\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """Fault injection, for testing fault tolerance."""

    inject: tuple[str, ...] = ()
    """Faults to inject, each as kind@step[#process][!][:value], e.g. kill@120 nan-grad@80#1."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One of them, parsed."""

    text: str
    kind: str
    step: int
    process: int
    always: bool
    value: float | None

    @classmethod
    def parsed(cls, text: str) -> "Fault":
        """Raises UserError if it is none."""
        match = GRAMMAR.fullmatch(text)
        if match is None:
            raise UserError(
                f"faults.inject {text!r}: wanted kind@step[#process][!][:value], e.g. kill@120 or hang@50#1."
            )
        kind = match["kind"]
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise UserError(
                f"faults.inject {text!r}: no kind {kind!r}; "
                + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(KINDS)}.")
            )
        value = None if match["value"] is None else float(match["value"])
        return cls(text, kind, int(match["step"]), int(match["process"] or 0), bool(match["always"]), value)


class Faults:
    """Those that are for this process."""

    def __init__(self, config: FaultsConfig, run: RunDirectory, *, process: int):
        place = int(os.environ.get("DITO_PLACE", process))
        parsed = [Fault.parsed(text) for text in config.inject]
        self._faults = [f for f in parsed if f.process == (place if f.kind == "dead" else process)]
        self._path = run.path / "faults.jsonl"
        self._run, self._process = run, process
        self._struck = [row["fault"] for row in json_lines(self._path)]
        self._poisoning: tuple[int, list[Fault]] = (0, [])  # the last step whose rows were asked for, and its faults

    def begin(self) -> None:
        """At the start of a process."""
        for fault in self._faults:
            if fault.kind == "dead" and fault.text in self._struck:
                self._strike(fault, "its place is dead")
                os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, step: int) -> None:
        """What stops or slows a process."""
        for fault in self._faults:
            if fault.kind == "slow-rank" and step >= fault.step:
                time.sleep(0.5 if fault.value is None else fault.value)
        for fault in self._due(step, *STOPS, "dead"):
            self._strike(fault, f"at step {step}")
            if fault.kind == "crash":
                raise RuntimeError(f"drill: {fault.text}")
            if fault.kind == "hang":
                _hang()
            os.kill(os.getpid(), SIGNALS.get(fault.kind, signal.SIGKILL))

    def in_memory[Tree](self, step: int, state: Tree) -> Tree:
        """The state with a bit of one device's copy flipped, where the drill wants that."""
        for fault in self._due(step, "bitflip-copy"):
            leaves, tree = jax.tree.flatten(state)
            at = next(i for i, leaf in enumerate(leaves) if leaf.dtype == np.float32 and leaf.ndim > 1)
            *others, last = leaves[at].addressable_shards
            bits = np.array(last.data).view(np.uint32)
            bits.flat[0] ^= 1 << 20
            pieces = [*(shard.data for shard in others), jax.device_put(bits.view(np.float32), last.device)]
            self._strike(fault, f"on {last.device} before step {step}")
            leaves[at] = jax.make_array_from_single_device_arrays(leaves[at].shape, leaves[at].sharding, pieces)
            state = jax.tree.unflatten(tree, leaves)
        return state

    def poisoned(self, step: int, rows: dict[str, Any]) -> dict[str, Any]:
        """This process's rows of the step's batch, as the drill wants them."""
        again = step == self._poisoning[0]
        if not again:
            self._poisoning = step, list(self._due(step, *POISONS))
        for fault in self._poisoning[1]:
            self._strike(fault, f"in the data of step {step}")
            factor = (100.0 if fault.value is None else fault.value) if fault.kind == "spike" else np.nan
            if not (again and fault.kind == "transient-nan"):
                rows = rows | {"image": rows["image"] * np.float32(factor)}
        return rows

    def before_save(self, step: int) -> None:
        """What keeps a save from the disk."""
        for fault in self._due(step, "disk-full"):
            self._strike(fault, f"at the save of step {step}")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def after_save(self, step: int, path: Path) -> None:
        """What becomes of a checkpoint that is whole on the disk."""
        for fault in self._due(step, *DAMAGES):
            file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
            self._strike(fault, f"on {file}")
            content = bytearray(file.read_bytes())
            if fault.kind == "bitflip-ckpt":
                bit = random.Random(step).randrange(8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
                file.write_bytes(content)
            elif fault.kind == "truncate-ckpt":
                os.truncate(file, len(content) // 2)
            else:
                file.unlink()

    def _due(self, step: int, *kinds: str) -> Iterator[Fault]:
        for fault in self._faults:
            if fault.kind in kinds and fault.step == step and (fault.always or fault.text not in self._struck):
                yield fault

    def _strike(self, fault: Fault, where: str) -> None:
        """On the disk before it happens, or a run that starts again would meet it again."""
        self._run.append(self._path, json.dumps({"fault": fault.text, "process": self._process}) + "\n")
        self._struck.append(fault.text)
        print(f"drill: {fault.text} {where}", file=sys.stderr, flush=True)


def _hang() -> None:
    while True:
        time.sleep(3600)
