"""Searches block sizes for this GPU, and writes what is faster than the defaults; tuning.py looks it up.

    python -m kernels_pallas.tune [op ...] [--case NAME] [--kernel triton] [--ship | --out FILE] [--seconds 180]
    python -m kernels_pallas.tune [op ...] --prune-only [--device h200]
    python -m kernels_pallas.tune [op ...] --dry-run

For every case of a real model, and each kernel in it whose family names candidates:
  1. Candidates are compiled as for a GPU that is not there, in a process of their own. Those that do not compile,
     spill registers, or ask for more shared memory than there is, are out. Where the compiler's wheels are missing
     this is left out.
  2. On a GPU, each is run once, and held to the default's result: one that raises, or is wrong, is out.
  3. The others take turns, timed as timing.py does. After 3 rounds those that take 1.5 times the best are out.
  4. The fastest is written, if it is 2 % faster than the default; else the default is.
Each kernel and case has --seconds at most, compiling included; the candidates that were not reached are named in
its entry. An entry is written once it is done: a run cut short keeps the rest, and the next goes on where it
stopped. --again measures anew what today's source was measured for.

Entries go to the user's own file (tuning.py says which), --ship puts them in kernels_pallas/tuned/. Without a GPU
the command does the first step alone.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import OPS, backend, deviceless, hardware, measured, tuning
from ..op import Case, Kernel, Op
from . import command_line, inspect, main as bench, timing


FIRST_ROUNDS, ROUNDS = 3, 20
TOO_SLOW = 1.5  # times the best, after the first rounds
COMPILING = 0.7  # of the time that a search has, at most; the rest is for measuring
MARGIN = 0.98  # of the default's time: what is less than that is noise
PRUNED = (
    "kernel", "dtype", "width", "mask", "size", "config", "registers", "spill_bytes", "shared_memory_bytes", "verdict",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One search: a kernel at the first case that asks for its blocks with this key."""

    op: Op
    implementation: str
    case: str
    pass_: str
    key: tuning.Key
    default: Any
    configs: tuple[Any, ...]  # the default first

    def __str__(self) -> str:
        return f"{self.key}: {self.op.name} {self.case} {self.pass_}, {len(self.configs)} candidates"


def main(argv: list[str] | None = None, ops: tuple[Op, ...] = OPS) -> int:
    """The command; its exit code."""
    parser = command_line.parser("tune", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list what would be searched")
    what.add_argument("--prune-only", action="store_true", help="compile the candidates; time nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ship", action="store_true", help="write to kernels_pallas/tuned/")
    where.add_argument("--out", type=Path, metavar="FILE", help="write to this file")
    parser.add_argument("--kernel", metavar="NAME", help="only the kernel of this name, e.g. triton")
    parser.add_argument("--device", metavar="|".join(hardware.GPUS), help="the GPU to compile for; h200, or this one")
    parser.add_argument("--seconds", type=float, default=180.0, help="most for one kernel and case (180)")
    parser.add_argument("--again", action="store_true", help="also what was measured already")
    parser.add_argument("--json", action="store_true", help="with --prune-only: print one JSON list")
    args = parser.parse_args(argv)
    chosen = command_line.choose_ops(parser, args, [bench.with_sweep(op) for op in ops])
    kernels = {name: None for op in chosen for name in op.kernels}
    if args.kernel is not None and args.kernel not in kernels:
        parser.error(f"no kernel named {args.kernel!r}; choose from {', '.join(kernels)}.")
    if args.dry_run:
        backend.settle_platform()
        with backend.interpret_mode():  # every kernel can be traced
            print(*tasks(chosen, args), sep="\n")
        return 0
    if args.prune_only or not backend.gpu_present():
        return _prune_command(parser, args, chosen)
    return _search_command(parser, args, chosen)


def tasks(ops: Sequence[Op], args) -> list[Task]:
    """What there is to search: one task a key, of the cases of real models or of the one that is named."""
    found: dict[tuning.Key, Task] = {}
    for op in ops:
        for implementation, (name, case) in itertools.product(op.kernels, op.cases.items()):
            kernel = op.kernels[implementation]
            wanted = name == args.case if args.case else not (case.tiny or name in op.sweep)
            if not wanted or args.kernel not in (None, implementation) or not kernel.candidates:
                continue
            if reason := kernel.unsupported(*case.arrays, **case.static):
                print(f"{op.name} {implementation} {name}: skipped: {reason}", file=sys.stderr)
                continue
            for pass_, asked in keys(op, kernel, case).items():
                for key, default in asked.items():
                    if key.kernel in kernel.candidates and key not in found:
                        more = kernel.candidates[key.kernel](default, **_problem(key))
                        configs = tuple(dict.fromkeys([default, *more]))
                        found[key] = Task(op, implementation, name, pass_, key, default, configs)
    if not found:
        print("nothing to search: no kernel here names candidates for such a case", file=sys.stderr)
    return list(found.values())


def _problem(key: tuning.Key) -> dict[str, Any]:
    return {name: getattr(key, name) for name in tuning.KEY if name != "kernel"}


def keys(op: Op, kernel: Kernel, case: Case) -> dict[str, dict[tuning.Key, Any]]:
    """What a case's passes ask tuning.blocks for, and with which defaults; found by tracing them."""
    with tuning.listening() as forward:
        out, residuals = jax.eval_shape(functools.partial(kernel.forward, **case.static), *case.arrays)
    if "backward" not in op.passes:
        return {"forward": forward}
    with tuning.listening() as backward:
        jax.eval_shape(functools.partial(kernel.backward, **case.static), residuals, out)
    return {"forward": forward, "backward": backward}


# Pruning: what the compiler makes of a candidate.


def _prune_command(parser, args, ops) -> int:
    start = time.monotonic()
    device = args.device or "h200"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder, "dump")
        inspect.dump_ptx_to(dump)
        try:
            mesh = deviceless.mesh(device)
        except ValueError as error:
            parser.error(str(error))
        with jax.set_mesh(mesh):  # Pallas, and the defaults, read the GPU to compile for off it
            for task in {_any_size(task.key): task for task in tasks(ops, args)}.values():
                print(task, file=sys.stderr)
                rows += prune(task, hardware.GPUS[device], mesh, dump)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    plausible = sum(_is_plausible(row) for row in rows)
    print(f"{plausible} of {len(rows)} plausible on {device}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _any_size(key: tuning.Key) -> tuning.Key:
    """The key without its size, which changes nothing that pruning asks about."""
    return dataclasses.replace(key, size=0)


def prune(task: Task, gpu: hardware.Hardware, mesh: jax.sharding.Mesh, dump: Path) -> list[dict[str, Any]]:
    """A row a candidate: its registers, spills and shared memory, and a verdict: "plausible", or why not."""
    rows = []
    for config in task.configs:
        row: dict[str, Any] = {"kernel": task.key.kernel, **_problem(task.key), "config": dataclasses.asdict(config)}
        try:
            with tuning.trying(task.key.kernel, config):
                kernel, case = task.op.kernels[task.implementation], task.op.cases[task.case]
                function = task.key.kernel.rpartition(".")[0]
                functions = inspect.functions_of(function, kernel, case, task.pass_, gpu, mesh, dump)
            for column in ("registers", "spill_bytes", "shared_memory_bytes") if functions else ():
                row[column] = max(function[column] for function in functions)
            row["verdict"] = _verdict(row, gpu) if functions else "plausible: it compiles, and no PTX says more"
        except Exception as error:  # whatever it is, the other candidates still have their rows
            row["verdict"] = command_line.one_line(error)
        print(f"  {_name(config)}: {row['verdict']}", file=sys.stderr)
        rows.append(row)
    return rows


def _is_plausible(row: dict[str, Any]) -> bool:
    return row["verdict"].startswith("plausible")


def _verdict(row: dict[str, Any], gpu: hardware.Hardware) -> str:
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_memory_bytes"] > gpu.shared_memory:
        return f"needs {row['shared_memory_bytes']} bytes of shared memory, {gpu.name} has {gpu.shared_memory}"
    return "plausible"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in columns."""
    cell = lambda value: _short(value) if isinstance(value, dict) else str(value)
    lines = [PRUNED, *(tuple(cell(row.get(column, "")) for column in PRUNED) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _short(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


# Searching: what a candidate takes on the GPU at hand.


def _search_command(parser, args, ops) -> int:
    backend.settle_platform()
    device = backend.target()
    out = args.out or (tuning.shipped_path if args.ship else tuning.user_path)(device.kind)
    try:
        tuning.save(out, [])
        done = tuning.load(out)
    except (OSError, ValueError) as error:
        parser.error(f"cannot write {out}: {error}" if isinstance(error, OSError) else str(error))
    print(f"{device.kind}, by {timing.clock()}, into {out}", file=sys.stderr)
    run = {name: value for name, value in bench.facts(device).items() if name in ("device", "jax", "date")}
    pruned: dict[tuning.Key, list[dict[str, Any]]] = {}
    for task in tasks(ops, args):
        if not args.again and _is_done(done.get(task.key), task, run):
            print(f"{task.key}: measured already", file=sys.stderr)
            continue
        print(task, file=sys.stderr)
        start = time.monotonic()
        entry = search(task, _survivors(task, args.device, device, pruned), args.seconds) | run
        tuning.save(out, [entry])
        print(f"{_summary(entry)}, {time.monotonic() - start:.0f} s", flush=True)
    return 0


def _is_done(entry: dict[str, Any] | None, task: Task, run: dict[str, str]) -> bool:
    now = {"digest": measured.digest(task.op), "device": run["device"], "jax": run["jax"], "status": "ok"}
    return entry is not None and {name: entry[name] for name in now} == now


def _summary(entry: dict[str, Any]) -> str:
    head = " ".join(str(entry[name]) for name in tuning.KEY)
    if entry["status"] != "ok":
        return f"{head}: {entry['status']}"
    times = f"{entry['median_us']:.1f} us, default {entry['default_us']:.1f} us"
    return f"{head}: {_short(entry['config'])}: {times}, {len(entry['failed'])} failed"


def _survivors(task: Task, name: str | None, device: backend.Target, pruned: dict) -> tuple[Any, ...]:
    """The candidates that pruning leaves, the default among them; all where there is nothing to prune with.

    `pruned` holds the configs that are out, by key without size, of this run so far.
    """
    known = hardware.by_device_kind(device.kind)
    name = name or (known.name if known else None)
    why_not = deviceless.why_not() or (None if name else f"{device.kind} is not in hardware.py; give --device")
    if _any_size(task.key) not in pruned and why_not is None:
        rows, why_not = _pruned_apart(task, str(name))
        for row in rows:
            out = pruned.setdefault(_any_size(tuning.Key(**{field: row[field] for field in tuning.KEY})), [])
            out += [] if _is_plausible(row) else [row["config"]]
    if why_not:
        print(f"{task.key}: candidates are not pruned: {why_not}", file=sys.stderr)
    out = pruned.get(_any_size(task.key), [])
    return tuple(c for c in task.configs if c == task.default or dataclasses.asdict(c) not in out)


def _pruned_apart(task: Task, device: str) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of --prune-only, by a process of its own: XLA reads where to write PTX once. Or why there are none."""
    words = [task.op.name, "--case", task.case, "--kernel", task.implementation, "--device", device]
    command = [sys.executable, "-m", "kernels_pallas.tune", *words, "--prune-only", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if child.returncode:
        return [], child.stderr.strip().rpartition("\n")[2]
    return json.loads(child.stdout), None


def search(task: Task, configs: Sequence[Any], seconds: float) -> dict[str, Any]:
    """The entry of one task, without what is true of the whole run. Its status is "ok", or why there is no config."""
    start = time.monotonic()
    calls, failed = _ready(task, configs, start + COMPILING * seconds)
    entry = dataclasses.asdict(task.key) | {
        "op": task.op.name, "case": task.case, "digest": measured.digest(task.op), "failed": failed,
        "config": dataclasses.asdict(task.default), "status": "ok", "median_us": None, "default_us": None,
    }  # fmt: skip
    if task.default not in calls:
        return entry | {"status": f"the default does not run: {failed.get(_name(task.default), 'not tried')}"}
    samples = _race(calls, task.default, start + seconds)
    medians = {config: float(np.median(times)) for config, times in samples.items()}
    best = min(medians, key=medians.__getitem__)
    if medians[best] > MARGIN * medians[task.default]:
        best = task.default
    figures = {"median_us": round(medians[best], 3), "default_us": round(medians[task.default], 3)}
    return entry | {"config": dataclasses.asdict(best)} | figures


def _ready(task: Task, configs: Sequence[Any], deadline: float) -> tuple[dict[Any, timing.Call], dict[str, str]]:
    """A compiled call of each candidate that gives the default's result, and what is wrong with the others."""
    case = task.op.cases[task.case]
    arrays = case.random(jax.random.key(0))
    copies = timing.copies(arrays)
    calls, failed, want = {}, {}, None
    for config in [task.default, *(c for c in configs if c != task.default)]:
        if calls and time.monotonic() > deadline:
            failed[_name(config)] = "not tried: out of time"
            continue
        try:
            with tuning.trying(task.key.kernel, config), tuning.listening() as asked:
                call = bench.call(task.op, task.implementation, case.static, task.pass_, copies)
                got = call.answer()
                timing.microseconds(call)  # what cannot be timed shows here
            if task.key not in asked:
                raise RuntimeError("it did not ask for its blocks: something in it was compiled before")
        except Exception as error:  # whatever it is, the other candidates still have their turn
            failed[_name(config)] = command_line.one_line(error)
            if config == task.default:
                break  # there is nothing to hold the others to
            continue
        want = got if config == task.default else want
        if (status := bench.final_evaluation(got, want, arrays)) == "ok":
            calls[config] = call
        else:
            failed[_name(config)] = status
    return calls, failed


def _race(calls: dict[Any, timing.Call], default: Any, deadline: float) -> dict[Any, list[float]]:
    """Microseconds of every candidate that stayed to the end, the default always among them."""
    names = {_name(config): config for config in calls}
    racing = {name: calls[config] for name, config in names.items()}
    samples = timing.in_turns(racing, FIRST_ROUNDS)
    best = min(float(np.median(times)) for times in samples.values())
    keep = [n for n, times in samples.items() if np.median(times) <= TOO_SLOW * best or names[n] == default]
    for round_ in range(FIRST_ROUNDS, ROUNDS):
        if time.monotonic() > deadline:
            break
        for name, times in timing.in_turns({n: racing[n] for n in keep}, 1, first=round_).items():
            samples[name] += times
    return {names[name]: samples[name] for name in keep}


def _name(config: Any) -> str:
    return _short(dataclasses.asdict(config))


if __name__ == "__main__":
    sys.exit(main())
