"""Fault injection for testing fault tolerance: `--faults.inject kill@120 hang@50#1 nan-grad@80`.

    kind@step[#process][!][:value]

The default process is 0. Each fault is injected once per run, or, with !, at every start of the run that reaches the
step. Each injection is logged in RUN/faults.jsonl before it happens. Kinds:

    kill term crash hang freeze   SIGKILL, SIGTERM, an exception, an endless sleep, SIGSTOP: before the step
    slow-rank                     sleeps `value` seconds (default 0.5) in every step from this one on
    dead                          SIGKILL at the step and at every later start; #n is the worker number, $DITO_WORKER
    nan-grad                      sets the images of the step to NaN
    spike                         multiplies the images of the step by `value` (default 100)
    transient-nan                 sets the images of the step to NaN, but not when the step is rerun
    bitflip-copy                  flips a bit in the last device's copy of the first parameter, before the step
    bitflip-ckpt truncate-ckpt delete-ckpt   damages the largest file of the step's checkpoint after it was written
    disk-full                     from the save of the step on, no file can grow beyond 4,096 bytes
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
FULL = 4096  # maximum bytes of a file while disk-full is injected
GRAMMAR = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d+)(#(?P<process>\d+))?(?P<always>!)?(:(?P<value>\d+(\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """Fault injection, for testing fault tolerance."""

    inject: tuple[str, ...] = ()
    """Faults to inject, each as kind@step[#process][!][:value], e.g. kill@120 nan-grad@80#1."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One parsed fault of FaultsConfig.inject."""

    text: str
    kind: str
    step: int
    process: int
    always: bool
    value: float | None

    @classmethod
    def parsed(cls, text: str) -> "Fault":
        """Parses kind@step[#process][!][:value].

        Raises:
          UserError: the text does not have this form, or the kind is unknown.
        """
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
    """Injects the faults of the config that are for this process."""

    def __init__(self, config: FaultsConfig, run: RunDirectory, *, process: int):
        worker = int(os.environ.get("DITO_WORKER", process))
        parsed = [Fault.parsed(text) for text in config.inject]
        self._faults = [f for f in parsed if f.process == (worker if f.kind == "dead" else process)]
        self._path = run.path / "faults.jsonl"
        self._run, self._process = run, process
        self._injected = [row["fault"] for row in json_lines(self._path, fault=str)]
        self._poisoning: tuple[int, list[Fault]] = (0, [])  # the last step passed to `poisoned`, and its faults

    def begin(self) -> None:
        """Kills this process if an earlier `dead` fault was injected on its worker; call it at the start."""
        for fault in self._faults:
            if fault.kind == "dead" and fault.text in self._injected:
                self._log_injection(fault, "at the start")
                os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, step: int) -> None:
        """Injects faults that stop or slow this process."""
        for fault in self._faults:
            if fault.kind == "slow-rank" and step >= fault.step:
                time.sleep(0.5 if fault.value is None else fault.value)
        for fault in self._due(step, *STOPS, "dead"):
            self._log_injection(fault, f"at step {step}")
            if fault.kind == "crash":
                raise RuntimeError(f"injected fault: {fault.text}")
            if fault.kind == "hang":
                _hang()
            os.kill(os.getpid(), SIGNALS.get(fault.kind, signal.SIGKILL))

    def in_memory[Tree](self, step: int, state: Tree) -> Tree:
        """Returns the state, with one bit of one device's copy flipped if bitflip-copy is due."""
        for fault in self._due(step, "bitflip-copy"):
            leaves, tree = jax.tree.flatten(state)
            at = next(i for i, leaf in enumerate(leaves) if leaf.dtype == np.float32 and leaf.ndim > 1)
            *others, last = leaves[at].addressable_shards
            bits = np.array(last.data).view(np.uint32)
            bits.flat[0] ^= 1 << 20
            pieces = [*(shard.data for shard in others), jax.device_put(bits.view(np.float32), last.device)]
            self._log_injection(fault, f"on {last.device} before step {step}")
            leaves[at] = jax.make_array_from_single_device_arrays(leaves[at].shape, leaves[at].sharding, pieces)
            state = jax.tree.unflatten(tree, leaves)
        return state

    def poisoned(self, step: int, rows: dict[str, Any]) -> dict[str, Any]:
        """Returns this process's rows of the step's batch, with NaN or scaled images if such a fault is due."""
        again = step == self._poisoning[0]
        if not again:
            self._poisoning = step, list(self._due(step, *POISONS))
        for fault in self._poisoning[1]:
            self._log_injection(fault, f"in the data of step {step}")
            factor = (100.0 if fault.value is None else fault.value) if fault.kind == "spike" else np.nan
            if not (again and fault.kind == "transient-nan"):
                rows = rows | {"image": rows["image"] * np.float32(factor)}
        return rows

    def before_save(self, step: int) -> None:
        """Limits the file size of this process if disk-full is due."""
        for fault in self._due(step, "disk-full"):
            self._log_injection(fault, f"at the save of step {step}")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def after_save(self, step: int, path: Path) -> None:
        """Damages a checkpoint that has been written, if such a fault is due."""
        for fault in self._due(step, *DAMAGES):
            file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
            self._log_injection(fault, f"on {file}")
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
            if fault.kind in kinds and fault.step == step and (fault.always or fault.text not in self._injected):
                yield fault

    def _log_injection(self, fault: Fault, where: str) -> None:
        """Logs the injection on disk before it happens, so that a restarted run does not repeat it."""
        self._run.append(self._path, json.dumps({"fault": fault.text, "process": self._process}) + "\n")
        self._injected.append(fault.text)
        print(f"injected fault: {fault.text} {where}", file=sys.stderr, flush=True)


def _hang() -> None:
    while True:
        time.sleep(3600)
