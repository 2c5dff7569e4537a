"""Benchmarks every implementation of the operations, and baselines from other libraries, against the roofline.

    python -m kernels_pallas.bench [op ...] [--case NAME] [--tiny | --sweep | --all] [--out FILE] [--jobs N]
    python -m kernels_pallas.bench [op ...] --stale

On a GPU it runs the cases of real models and writes results/<device>.csv. Without a GPU it runs the tiny cases on the
CPU and writes no file unless --out names one. The rows of one pass of one case are written as soon as they are
measured and replace the earlier ones, so an interrupted run keeps what it has measured. With --jobs N, N processes
compile in parallel and are timed one at a time (side_by_side.py).

A row holds the median and the 20th and 80th percentile of ROUNDS runs on normally distributed inputs. The
implementations are run in turn; timing.py describes the clock and how the GPU's L2 cache is kept cold. The passes are
`forward`; `backward`, which is vjp(d_out) alone after `out, vjp = jax.vjp(...)`; and `both`, forward and backward in
one compiled function. The implementations are "xla", the op's kernels, and the baselines (peers/__init__.py describes
how those are run). `tflops`, `gbps` and `of_roofline` are computed from the op's Cost for these inputs, the minimum
work; `of_roofline` is empty if hardware.py does not know the device. `copy_gbps` is the bandwidth that the device
reached in the same run with a kernel that only reads and writes.

`status` is "ok", or the reason why there is no time: the error that was raised, or "wrong" with the error relative to
"xla" on the same inputs. If "xla" gives no result, for example because its scores do not fit in memory, the first
library or baseline that gives one is the reference. An "unchecked" row has a time, but there was no reference to
compare with. A "yardstick" row is an upper bound on speed: as much work as the op, with another result.
"""

import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import OPS, backend, hardware, measured, tuning
from ..op import Case, Cost, Op
from . import command_line, side_by_side, timing
from .peers import PEERS


ROUNDS = 20
HOPPER = re.compile(r"\bG?H[12]00\b")  # matches JAX's device kinds of all H100, H200 and GH200 cards
YARDSTICK = "yardstick: as much work, another result"
SHOWN = {
    "op": 16, "case": 24, "pass": 8, "implementation": 14, "median_us": 11, "p20_us": 11, "p80_us": 11,
    "tflops": 9, "gbps": 9, "of_roofline": 11, "status": 0,
}  # fmt: skip


def main(argv: list[str] | None = None, ops: tuple[Op, ...] = OPS) -> int:
    """Runs the command and returns its exit code."""
    parser = command_line.parser("bench", __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tiny", action="store_true", help="run the tiny cases, which a CPU can run")
    which.add_argument(
        "--sweep", action="store_true", help="run the sweep cases: more sizes, which only this command runs"
    )
    which.add_argument("--all", action="store_true", help="run all cases: tiny, sweep and those of real models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV file to write")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="compile in N parallel processes (default: 1)")
    parser.add_argument(
        "--stale", action="store_true", help="list benchmarks that are missing or older than the source; run none"
    )
    args = parser.parse_args(argv)
    chosen = command_line.choose_ops(parser, args, [with_sweep(op) for op in ops])
    if args.stale:
        for line in stale(chosen, everything=not args.ops):
            print(line)
        return 0

    if args.jobs > 1:
        side_by_side.share_memory()
    backend.settle_platform()
    device = backend.target()
    out = args.out or (measured.csv_path(device.kind) if device.platform == "gpu" else None)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {out} ({error.strerror}); give another --out.")
    tasks = [(op, name, pass_) for op in chosen for name in _cases(op, args, device.platform) for pass_ in passes(op)]
    if device.platform != "gpu":
        print(_without_gpu(tasks, out), file=sys.stderr)
    run = facts(device)
    copy = f"; copy bandwidth: {run['copy_gbps']} GB/s" if run["copy_gbps"] else ""
    print(f"{device.kind}, timed by {timing.clock()}{copy}", file=sys.stderr)
    print(_line({column: column for column in SHOWN}))
    for rows in _measured(tasks, args.jobs):
        rows = [row | run for row in rows]
        for row in rows:
            print(_line(row), flush=True)
        if out is not None:
            merge(out, rows)
    return 0


def _without_gpu(tasks: Sequence[tuple[Op, str, str]], out: Path | None) -> str:
    """One line that says what a run without a GPU does."""
    cases = {(op.name, name) for op, name, _ in tasks}
    where = f"into {out}" if out else "nothing is saved without --out"
    return (
        f"No GPU: timing {len(tasks)} passes of {len(cases)} cases on the CPU, where GPU kernels do not run; {where}. "
        "Name an op or a --case to run fewer; Ctrl-C stops."
    )


def _measured(tasks: Sequence[tuple[Op, str, str]], jobs: int) -> Iterator[list[dict[str, str]]]:
    if jobs > 1:
        named = [(op.name, name, pass_) for op, name, pass_ in tasks]
        return side_by_side.measure_all(_prepare_named, finish, named, jobs)
    return (measure(*task) for task in tasks)


def with_sweep(op: Op) -> Op:
    """The op with its sweep cases among its cases, so that --case finds them."""
    return dataclasses.replace(op, cases={**op.cases, **op.sweep})


def _cases(op: Op, args, platform: str) -> list[str]:
    if args.case is not None:
        return [args.case] if args.case in op.cases else []
    tiny = args.tiny or platform != "gpu"
    wanted = lambda name, case: name in op.sweep if args.sweep else name not in op.sweep and case.tiny == tiny
    return [name for name, case in op.cases.items() if args.all or wanted(name, case)]


def passes(op: Op) -> tuple[str, ...]:
    """The op's own passes, and "both" if it has two: a training step runs forward and backward in one function."""
    return (*op.passes, "both") if len(op.passes) > 1 else op.passes


def measure(op: Op, name: str, pass_: str) -> list[dict[str, str]]:
    """The rows of one pass of the case called `name`: one per implementation, "xla" first."""
    return finish(prepare(op, name, pass_))


@dataclasses.dataclass
class Ready:
    """One pass of one case, ready to be timed: the status of every implementation, and the calls that can be timed."""

    head: dict[str, str]
    status: dict[str, str]
    calls: dict[str, timing.Call]
    work: Cost
    dtype: str


def prepare(op: Op, name: str, pass_: str) -> Ready:
    """Compiles every implementation and checks the results against the reference."""
    case = (op.cases | op.sweep)[name]
    arrays = case.random(jax.random.key(0))
    status, calls, want = {}, {}, None
    for implementation, independent, ready in _contestants(op, case, pass_, timing.copies(arrays)):
        if isinstance(ready, str):
            status[implementation] = ready
            continue
        try:
            call = ready()
            got = call.answer()
            timing.microseconds(call)  # raises here if the call cannot be timed
            want = got if want is None and independent else want
            status[implementation] = YARDSTICK if independent is None else check_result(got, want, arrays)
        except Exception as error:  # any error: the other implementations are still measured
            status[implementation] = command_line.one_line(error)
            continue
        if not status[implementation].startswith("wrong"):
            calls[implementation] = call
    head = {"op": op.name, "case": name, "pass": pass_, "digest": measured.digest(op)}
    return Ready(head, status, calls, cost(op, pass_, arrays, case.static), _dtype(arrays))


def _prepare_named(op: str, name: str, pass_: str) -> Ready:
    return prepare(next(o for o in OPS if o.name == op), name, pass_)


def finish(ready: Ready) -> list[dict[str, str]]:
    """Times the calls in turn and returns one row per implementation."""
    samples = timing.in_turns(ready.calls, ROUNDS)
    figures = lambda i: _figures(ready.work, ready.dtype, samples[i]) if i in samples else {}
    return [ready.head | {"implementation": i, "status": ready.status[i]} | figures(i) for i in ready.status]


type Contestant = tuple[str, bool | None, str | Callable[[], timing.Call]]


def _contestants(op: Op, case: Case, pass_: str, copies: Sequence[timing.Arrays]) -> Iterator[Contestant]:
    """Yields (name, independent, call or the reason why there is none) of each implementation, our kernels last.

    `independent` is true if the result may be the reference instead of that of "xla", and None for a yardstick.
    """
    runnable = op.runnable(*case.arrays, **case.static)
    kernels = {name: kernel for name, kernel in op.kernels.items() if name in runnable}
    trusted = [name for name, kernel in kernels.items() if kernel.external and not kernel.needs_gpu_proof]
    ours = [name for name in kernels if name not in trusted]
    for name in ("xla", *trusted):
        yield name, True, functools.partial(call, op, name, case.static, pass_, copies)
    for name, peer in PEERS.get(op.name, {}).items():
        reason = peer.unsupported(*case.arrays, **case.static)
        independent = None if peer.yardstick else True
        yield name, independent, reason or functools.partial(peer.call, pass_, copies, **case.static)
    for name in ours:
        yield name, False, functools.partial(call, op, name, case.static, pass_, copies)


def call(op: Op, implementation: str, static, pass_: str, copies: Sequence[timing.Arrays]) -> timing.Call:
    """One pass of one implementation of the op."""
    return timing.call(functools.partial(op, implementation=implementation, **static), pass_, copies)


def cost(op: Op, pass_: str, arrays, static) -> Cost:
    """The minimum work of one pass on these inputs (it may depend on their values); for "both", of the two passes."""
    costs = [op.cost[name](*arrays, **static) for name in (op.passes if pass_ == "both" else (pass_,))]
    add = lambda field: sum(getattr(c, field) for c in costs)
    return Cost(add("flops"), add("bytes"), add("transcendentals"))


def check_result(got, want, arrays) -> str:
    """The status of a result: "ok", "wrong: ..." or "unchecked: ...". A sanity check; the tests check the accuracy."""
    if want is None:
        return "unchecked: no other implementation gave a result"
    # The tolerance is four units in the last place of the coarsest input, in norms of whole arrays. float32 counts as
    # TensorFloat-32 (10 bits of mantissa), to which a GPU's tensor cores may round it.
    if any(not np.array_equal(g, w) for g, w in zip(_integers(got), _integers(want), strict=True)):
        return "wrong: integers differ"
    if not _floating(want):
        return "ok"
    units = [float(jnp.finfo(a.dtype).eps) for a in _floating(arrays)]
    error = float(_relative_error(_floating(got), _floating(want)))
    return "ok" if error <= 4 * max([*units, 2**-10]) else f"wrong: relative error {error:.1e}"


def _floating(tree) -> list:
    """The floating-point arrays of a tree; cotangents of integers (float0) have no values."""
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


def _integers(tree) -> list:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.integer)]


def _dtype(arrays) -> str:
    """The dtype of the arithmetic, which chooses the peak rate; "float32" if all arrays are integers."""
    return next((a.dtype.name for a in _floating(arrays)), "float32")


@jax.jit
def _relative_error(got, want) -> jax.Array:
    """The largest |got - want| / |want| over lists of arrays, in Frobenius norms; NaN if either has one."""
    errors = []
    for g, w in zip(got, want, strict=True):
        g32, w32 = g.astype(jnp.float32).ravel(), w.astype(jnp.float32).ravel()
        difference = jnp.linalg.norm(jnp.where(g32 == w32, 0.0, g32 - w32))  # -inf in both is no difference
        size = jnp.linalg.norm(jnp.where(jnp.isinf(w32), 0.0, w32))
        errors.append(jnp.where(difference == 0, 0.0, difference / size))
    return jnp.stack(errors).max()


def _figures(work: Cost, dtype: str, samples: list[float]) -> dict[str, str]:
    median, p20, p80 = np.percentile(samples, [50, 20, 80])
    seconds = median / 1e6
    figures = {
        "median_us": median, "p20_us": p20, "p80_us": p80, "tflops": work.flops / seconds / 1e12,
        "gbps": work.bytes / seconds / 1e9,
    }  # fmt: skip
    if gpu := hardware.by_device_kind(backend.target().kind):
        figures["of_roofline"] = work.seconds(gpu.peak(dtype), gpu.bandwidth) / seconds
    return {column: f"{figure:.3f}" for column, figure in figures.items()}


def facts(device: backend.Target) -> dict[str, str]:
    """The columns that all rows of one run share."""
    return {
        "device": device.kind,
        "copy_gbps": f"{timing.copy_gbps():.0f}" if device.platform == "gpu" else "",
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str:
    """The current git commit, with "+dirty" if anything but results/ differs from it; "unknown" without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ":/", ":(exclude)results")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _line(row: dict[str, str]) -> str:
    return "  ".join(row.get(column, "").ljust(width) for column, width in SHOWN.items()).rstrip()


def merge(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes `rows` to a CSV file atomically; they replace the file's rows of the same ops, cases and passes."""
    what = lambda row: (row["op"], row["case"], row["pass"])
    replaced = {what(row) for row in rows}
    kept = [row for row in _read(path) if what(row) not in replaced]
    order = lambda row: [row[column] for column in ("op", "case", "pass", "implementation")]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, measured.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + rows, key=order))
    os.replace(temporary, path)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stale(ops: list[Op], *, everything: bool) -> list[str]:
    """One line for each benchmark that is older than the source, and for each kernel never measured on Hopper.

    `everything`: `ops` is the full list, so that rows of any other op belong to an op that no longer exists.
    """
    today = {op.name: measured.digest(op) for op in ops}
    lines, timed = {}, set()
    for path in sorted(measured.RESULTS.glob("*.csv")):
        for row in _read(path):
            if HOPPER.search(row["device"]) and row["status"] == "ok":
                timed.add((row["op"], row["implementation"]))
            if row["digest"] != today.get(row["op"]) and (everything or row["op"] in today):
                what = f"{row['op']} {row['case']} {row['implementation']}"
                lines[f"stale: {path.stem}: {what}: measured {row['date']} at {row['commit']}"] = None
    for path in sorted(tuning.SHIPPED.glob("*.json")):
        for key, entry in tuning.load(path).items():
            if entry["digest"] != today.get(entry["op"]) and (everything or entry["op"] in today):
                lines[f"stale: {path.stem}: blocks of {key}: measured {entry['date']}"] = None
    missing = [(op.name, kernel) for op in ops for kernel in op.kernels if (op.name, kernel) not in timed]
    return [*lines, *(f"never measured on Hopper: {op} {kernel}" for op, kernel in missing)]
