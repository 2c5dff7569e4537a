"""The fault injector, for drills: --faults.inject kill@120 hang@50#1 nan-grad@80.

`kind@step[#process][!][:value]`. Without #process it strikes in process 0. It strikes once a run, however often the
run is started; with ! at every start that comes to the step. A strike is in RUN/faults.jsonl, on the disk, before
it happens.
"""

import contextlib
import difflib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dito_jax.errors import UserError
from dito_jax.training.run_directory import RunDirectory, json_lines


VALUES = {"spike": 100.0, "slow-rank": 0.5, "disk-full": 4096.0}  # kinds that take a value, and what it is if not given
KINDS = {
    "kill": "SIGKILL to itself",
    "term": "SIGTERM to itself",
    "crash": "a RuntimeError",
    "hang": "the main thread sleeps for ever",
    "freeze": "SIGSTOP to itself: no thread runs",
    "nan-grad": "the images of the step become NaN, whenever this start comes to it",
    "transient-nan": "they become NaN the first time that this start comes to it",
    "spike": "they are multiplied by the value",
    "slow-rank": "sleeps so many seconds in this step and each that follows",
    "bitflip-ckpt": "one bit of the largest file of the checkpoint of the step is flipped",
    "truncate-ckpt": "half of it is cut off",
    "delete-ckpt": "it is deleted",
    "disk-full": "no file grows beyond so many bytes while the step is saved",
    "dead": "kill, in the process whose DITO_PLACE is #n: at the step, and at once at every later start",
}
SIGNALS = {"kill": signal.SIGKILL, "dead": signal.SIGKILL, "term": signal.SIGTERM, "freeze": signal.SIGSTOP}
SPEC = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d+)(#(?P<process>\d+))?(?P<always>!)?(:(?P<value>[\d.]+))?")


@dataclass(frozen=True)
class FaultsConfig:
    """What goes wrong in a drill."""

    inject: tuple[str, ...] = ()  # kind@step[#process][!][:value]


@dataclass(frozen=True)
class Fault:
    """One line of `inject`."""

    spec: str  # as it was given
    kind: str
    step: int
    process: int = 0
    always: bool = False
    value: float = 0.0


class Faults:
    """What strikes in this process, at the hooks that a run calls. Without faults they do nothing.

    Raises:
      UserError: a fault is not of the form above.
    """

    def __init__(self, config: FaultsConfig, run: RunDirectory, *, process: int):
        faults = [parse(spec) for spec in config.inject]
        place = os.environ.get("DITO_PLACE")
        here = [f for f in faults if (str(f.process) == place if f.kind == "dead" else f.process == process)]
        self._file, self._process = run.path / "faults.jsonl", process
        self._append = run.append
        struck = {row["fault"] for row in json_lines(self._file)} if here else set()
        self._returned = [f for f in here if f.kind == "dead" and f.spec in struck]
        self._faults = [f for f in here if f.always or f.spec not in struck]
        self._struck: set[Fault] = set()  # since this start

    def begin(self) -> None:
        """At the start of a process: the dead stay dead."""
        for fault in self._returned:
            self._strike(fault)
            os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, step: int) -> None:
        """Where a process ends, stands still, or is slow.

        Raises:
          RuntimeError: a crash.
        """
        for fault in self._faults:
            if fault.kind == "slow-rank" and step >= fault.step:
                if fault not in self._struck:
                    self._strike(fault)
                time.sleep(fault.value)
            elif fault.kind in SIGNALS and step == fault.step:
                self._strike(fault)
                os.kill(os.getpid(), SIGNALS[fault.kind])
            elif fault.kind == "crash" and step == fault.step:
                self._strike(fault)
                raise RuntimeError(f"drill: {fault.spec}")
            elif fault.kind == "hang" and step == fault.step:
                self._strike(fault)
                while True:
                    time.sleep(3600)

    def poisoned(self, step: int, images: np.ndarray) -> np.ndarray:
        """This process's share of a step's images, floating-point, or what becomes of them."""
        for fault in self._at(step, "nan-grad", "transient-nan", "spike"):
            if fault.kind == "transient-nan" and fault in self._struck:
                continue
            self._strike(fault)
            factor = fault.value if fault.kind == "spike" else np.nan
            images = images * np.asarray(factor, images.dtype)
        return images

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the save of a step, to its end: the disk may be full."""
        full = self._at(step, "disk-full")
        if not full:
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._strike(full[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(full[0].value), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def after_save(self, step: int, path: Path) -> None:
        """When the checkpoint of a step is whole, in `path`: something may become of it."""
        for fault in self._at(step, "bitflip-ckpt", "truncate-ckpt", "delete-ckpt"):
            self._strike(fault)
            file = largest_data_file(path)
            if fault.kind == "delete-ckpt":
                file.unlink()
            elif fault.kind == "truncate-ckpt":
                os.truncate(file, file.stat().st_size // 2)
            else:
                flip_bit(file, seed=step)

    def _at(self, step: int, *kinds: str) -> list[Fault]:
        return [fault for fault in self._faults if fault.step == step and fault.kind in kinds]

    def _strike(self, fault: Fault) -> None:
        """Says that a fault strikes, first on the disk, so that a run that it kills knows."""
        self._struck.add(fault)
        row = {"time": time.time(), "process": self._process, "fault": fault.spec}
        self._append(self._file, json.dumps(row) + "\n")
        print(f"drill: {fault.spec}: {KINDS[fault.kind]}.", file=sys.stderr, flush=True)


def parse(spec: str) -> Fault:
    """`kind@step[#process][!][:value]`; raises UserError, in one line, if it is not."""
    found = SPEC.fullmatch(spec)
    if found is None:
        raise UserError(f"faults.inject {spec}: wanted kind@step[#process][!][:value], e.g. kill@120 or hang@50#1.")
    kind, value = found["kind"], found["value"]
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(KINDS)}."
        raise UserError(f"faults.inject {spec}: no kind {kind}; {hint}")
    if value is not None and kind not in VALUES:
        raise UserError(f"faults.inject {spec}: {kind} takes no value; these do: {', '.join(VALUES)}.")
    try:
        amount = float(VALUES.get(kind, 0.0) if value is None else value)
    except ValueError as error:
        raise UserError(f"faults.inject {spec}: the value {value} is no number.") from error
    return Fault(spec, kind, int(found["step"]), int(found["process"] or 0), bool(found["always"]), amount)


def largest_data_file(path: Path) -> Path:
    """The largest of the files in a checkpoint that hold arrays: Orbax puts them in directories called d."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.parent.name == "d"]
    return max(files, key=lambda file: file.stat().st_size)


def flip_bit(path: Path, *, seed: int) -> None:
    """Flips one bit of a file, which one the seed says."""
    bit = int(np.random.default_rng(seed).integers(8 * path.stat().st_size))
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
        file.flush()
        os.fsync(file.fileno())
