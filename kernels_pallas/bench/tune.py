"""Autotunes block sizes for this GPU and writes those that are faster than the defaults; tuning.py reads them.

    python -m kernels_pallas.tune [op ...] [--case NAME] [--kernel triton] [--ship | --out FILE] [--seconds 180]
    python -m kernels_pallas.tune [op ...] --prune-only [--device h200]
    python -m kernels_pallas.tune [op ...] --dry-run

For every case of a real model, and each of its kernels that has candidates:
  1. Pruning: a separate process cross-compiles the candidates. Those that do not compile, spill registers, or need
     more shared memory than the GPU has, are dropped. This step is skipped if the compiler's wheels are missing.
  2. On a GPU, each remaining candidate runs once and is compared with the result of the default block sizes. One that
     raises, or gives another result, is dropped.
  3. The others are timed in turn (timing.py). After 3 rounds those slower than 1.5 times the fastest are dropped.
  4. The fastest is written if it is 2 % faster than the default, else the default is.
Each kernel and case takes at most --seconds, compilation included; the entry names the candidates that were not
reached. An entry is written as soon as it is done: an interrupted run keeps its entries, and the next run continues
after them. --again also measures what has been measured with the current source.

Entries go to the user's own file (tuning.py describes which one); --ship writes them to kernels_pallas/tuned/. Without
a GPU only step 1 is run.
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
from . import command_line, machine_code, main as bench, timing


FIRST_ROUNDS, ROUNDS = 3, 20
TOO_SLOW = 1.5  # candidates slower than this many times the fastest are dropped after the first rounds
COMPILING = 0.7  # the largest share of a search's time for compilation; the rest is for measuring
MARGIN = 0.98  # the largest share of the default's time that counts as faster: smaller gains are noise
PRUNED = (
    "kernel", "dtype", "width", "mask", "size", "config", "registers", "spill_bytes", "shared_memory_bytes", "verdict",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One search: a kernel at the first case that looks up block sizes with this key."""

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
    """Runs the command and returns its exit code."""
    parser = command_line.parser("tune", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the searches; run none")
    what.add_argument("--prune-only", action="store_true", help="only drop candidates that spill or do not compile")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ship", action="store_true", help="write to kernels_pallas/tuned/")
    where.add_argument("--out", type=Path, metavar="FILE", help="write to this file")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel implementation, e.g. triton")
    parser.add_argument(
        "--device", metavar="|".join(hardware.GPUS), help="the GPU to compile for (default: this machine's, else h200)"
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit per kernel and case (default: 180)")
    parser.add_argument("--again", action="store_true", help="also repeat searches that are up to date")
    parser.add_argument("--json", action="store_true", help="with --prune-only: print one JSON list")
    args = parser.parse_args(argv)
    chosen = command_line.choose_ops(parser, args, [bench.with_sweep(op) for op in ops])
    kernels = {name: None for op in chosen for name in op.kernels}
    if args.kernel is not None and args.kernel not in kernels:
        parser.error(f"no kernel named {args.kernel!r}; choose from {', '.join(kernels)}.")
    if args.dry_run:
        backend.settle_platform()
        with backend.interpret_mode():  # in interpret mode every kernel can be traced
            print(*tasks(chosen, args), sep="\n")
        return 0
    if not (args.prune_only or backend.gpu_present()):
        print("No GPU: only dropping candidates that spill or do not compile (--prune-only).", file=sys.stderr)
        args.prune_only = True
    if args.prune_only:
        return _prune_command(parser, args, chosen)
    return _search_command(parser, args, chosen)


def tasks(ops: Sequence[Op], args) -> list[Task]:
    """The searches: one task per key, over the cases of real models, or over the case that --case names."""
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
        print("nothing to search: no kernel has candidates for such a case", file=sys.stderr)
    return list(found.values())


def _problem(key: tuning.Key) -> dict[str, Any]:
    return {name: getattr(key, name) for name in tuning.KEY if name != "kernel"}


def keys(op: Op, kernel: Kernel, case: Case) -> dict[str, dict[tuning.Key, Any]]:
    """The keys and defaults of the block-size look-ups in each pass of a case, found by tracing the passes."""
    with tuning.listening() as forward:
        out, residuals = jax.eval_shape(functools.partial(kernel.forward, **case.static), *case.arrays)
    if "backward" not in op.passes:
        return {"forward": forward}
    with tuning.listening() as backward:
        jax.eval_shape(functools.partial(kernel.backward, **case.static), residuals, out)
    return {"forward": forward, "backward": backward}


# Pruning: candidates that do not compile, or spill, are dropped.


def _prune_command(parser, args, ops) -> int:
    start = time.monotonic()
    device = args.device or "h200"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder, "dump")
        machine_code.dump_ptx_to(dump)
        try:
            mesh = deviceless.mesh(device)
        except ValueError as error:
            parser.error(str(error))
        with jax.set_mesh(mesh):  # Pallas, and the default block sizes, take the target GPU from the mesh
            for task in {_any_size(task.key): task for task in tasks(ops, args)}.values():
                print(task, file=sys.stderr)
                rows += prune(task, hardware.GPUS[device], mesh, dump)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    plausible = sum(_is_plausible(row) for row in rows)
    print(f"{plausible} of {len(rows)} plausible on {device}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _any_size(key: tuning.Key) -> tuning.Key:
    """The key without its size: the size does not change what pruning measures."""
    return dataclasses.replace(key, size=0)


def prune(task: Task, gpu: hardware.Hardware, mesh: jax.sharding.Mesh, dump: Path) -> list[dict[str, Any]]:
    """One row per candidate: registers, spills, shared memory, and a verdict: "plausible", or why it is dropped."""
    rows = []
    for config in task.configs:
        row: dict[str, Any] = {"kernel": task.key.kernel, **_problem(task.key), "config": dataclasses.asdict(config)}
        try:
            with tuning.trying(task.key.kernel, config):
                kernel, case = task.op.kernels[task.implementation], task.op.cases[task.case]
                function = task.key.kernel.rpartition(".")[0]
                functions = machine_code.functions_of(function, kernel, case, task.pass_, gpu, mesh, dump)
            for column in ("registers", "spill_bytes", "shared_memory_bytes") if functions else ():
                row[column] = max(function[column] for function in functions)
            row["verdict"] = _verdict(row, gpu) if functions else "plausible: it compiles; there is no PTX to inspect"
        except Exception as error:  # any error: the other candidates are still checked
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


# Searching: candidates are timed on this machine's GPU.


def _search_command(parser, args, ops) -> int:
    backend.settle_platform()
    device = backend.target()
    out = args.out or (tuning.shipped_path if args.ship else tuning.user_path)(device.kind)
    try:
        tuning.save(out, [])
        done = tuning.load(out)
    except (OSError, ValueError) as error:
        parser.error(f"cannot write {out}: {error}" if isinstance(error, OSError) else str(error))
    print(f"{device.kind}, timed by {timing.clock()}, into {out}", file=sys.stderr)
    run = {name: value for name, value in bench.facts(device).items() if name in ("device", "jax", "date")}
    pruned: dict[tuning.Key, list[dict[str, Any]]] = {}
    for task in tasks(ops, args):
        if not args.again and _is_done(done.get(task.key), task, run):
            print(f"{task.key}: up to date", file=sys.stderr)
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
    """The candidates that are left after pruning, the default among them; all of them if pruning is not possible.

    `pruned` holds the configs that this run has dropped so far, by key without size.
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
    """(rows of --prune-only, None) or ([], the reason why there are none).

    A separate process makes them, because XLA reads its dump flags only once.
    """
    words = [task.op.name, "--case", task.case, "--kernel", task.implementation, "--device", device]
    command = [sys.executable, "-m", "kernels_pallas.tune", *words, "--prune-only", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if child.returncode:
        return [], child.stderr.strip().rpartition("\n")[2]
    return json.loads(child.stdout), None


def search(task: Task, configs: Sequence[Any], seconds: float) -> dict[str, Any]:
    """The entry of one task, without the columns of the whole run. Its status is "ok", or why there is no config."""
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
    """(a compiled call of each candidate that gives the default's result, the errors of the other candidates)."""
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
                timing.microseconds(call)  # raises here if the call cannot be timed
            if task.key not in asked:
                raise RuntimeError("the kernel did not look up its block sizes: part of it was already compiled")
        except Exception as error:  # any error: the other candidates are still tried
            failed[_name(config)] = command_line.one_line(error)
            if config == task.default:
                break  # there is no result to compare the others with
            continue
        want = got if config == task.default else want
        if (status := bench.check_result(got, want, arrays)) == "ok":
            calls[config] = call
        else:
            failed[_name(config)] = status
    return calls, failed


def _race(calls: dict[Any, timing.Call], default: Any, deadline: float) -> dict[Any, list[float]]:
    """The times in microseconds of every candidate that was not dropped; the default is always among them."""
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
