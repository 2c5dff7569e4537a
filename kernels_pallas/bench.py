"""Times every implementation of every op, forward and backward apart, against the device's best.

    python -m kernels_pallas.bench [op ...] [--case NAME] [--tiny | --all] [--out FILE]
    python -m kernels_pallas.bench [op ...] --stale

On a GPU the cases of real models, into results/<device>.csv; elsewhere the tiny ones, and no file unless
--out names one. A case's rows replace its earlier ones once it is measured: a run cut short keeps the rest.

A row is the median, 20th and 80th percentile of ROUNDS runs on one set of normally distributed inputs, with
the implementations taking turns; timing.py says by which clock. `backward` is `out, vjp = jax.vjp(...)` and
then `vjp(d_out)` alone, for every implementation alike. `tflops`, `gbps` and `of_roofline` follow from the
op's Cost, the work that no implementation can avoid; `of_roofline` is empty where hardware.py does not know
the device.

`status` is "ok", or why there is no time: what the implementation raised, or "wrong" and its error relative
to "xla" on the same inputs. "unchecked" rows have a time, and no answer of "xla" to hold theirs against.
"""

import csv
import datetime
import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import OPS, backend, command_line, hardware, measured, timing
from .op import PASSES, Case, Op


ROUNDS = 20
SHOWN = {
    "op": 16, "case": 24, "pass": 8, "implementation": 14, "median_us": 11, "p20_us": 11, "p80_us": 11,
    "tflops": 9, "gbps": 9, "of_roofline": 11, "status": 0,
}  # fmt: skip


def main(argv: list[str] | None = None, ops: tuple[Op, ...] = OPS) -> int:
    """The command; its exit code."""
    parser = command_line.parser("bench", __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tiny", action="store_true", help="the tiny cases, which a CPU can run")
    which.add_argument("--all", action="store_true", help="tiny cases and those of real models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV file to write")
    parser.add_argument("--stale", action="store_true", help="list what should be measured again; measure nothing")
    args = parser.parse_args(argv)
    chosen = command_line.choose_ops(parser, args, ops)
    if args.stale:
        for line in stale(chosen, everything=not args.ops):
            print(line)
        return 0

    backend.settle_platform()
    device = backend.target()
    out = args.out or (measured.csv_path(device.kind) if device.platform == "gpu" else None)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {out} ({error.strerror}); give another --out.")
    print(f"{device.kind}, by {timing.clock()}", file=sys.stderr)
    facts = _facts(device.kind)
    print(_line({column: column for column in SHOWN}))
    for op in chosen:
        for name in _cases(op, args, device.platform):
            rows = [row | facts for pass_ in PASSES for row in measure(op, name, pass_)]
            for row in rows:
                print(_line(row), flush=True)
            if out is not None:
                merge(out, rows)
    return 0


def _cases(op: Op, args, platform: str) -> list[str]:
    if args.case is not None:
        return [args.case] if args.case in op.cases else []
    tiny = args.tiny or platform != "gpu"
    return [name for name, case in op.cases.items() if args.all or case.tiny == tiny]


def measure(op: Op, name: str, pass_: str) -> list[dict[str, str]]:
    """One row an implementation, "xla" first, of one pass at the case called `name`."""
    case = op.cases[name]
    arrays = case.random(jax.random.key(0))
    status, calls, want = {}, {}, None
    for implementation in sorted(op.runnable(*case.arrays, **case.static), key=lambda i: i != "xla"):
        try:
            function, arguments = _call(op, implementation, case, pass_, arrays)
            got = jax.block_until_ready(function(*arguments))
            timing.microseconds(function, arguments)  # what cannot be timed shows here
        except Exception as error:  # whatever it is, the other implementations still have their rows
            status[implementation] = command_line.one_line(error)
            continue
        if implementation == "xla":
            want = got
        status[implementation] = _judge(got, want, case)
        if not status[implementation].startswith("wrong"):
            calls[implementation] = function, arguments
    samples = timing.in_turns(calls, ROUNDS)
    head = {"op": op.name, "case": name, "pass": pass_, "digest": measured.digest(op)}
    return [
        head
        | {"implementation": i, "status": status[i]}
        | (_figures(op, case, pass_, samples[i]) if i in samples else {})
        for i in status
    ]


def _call(op: Op, implementation: str, case: Case, pass_: str, arrays) -> timing.Call:
    forward = jax.jit(functools.partial(op, implementation=implementation, **case.static))
    if pass_ == "forward":
        return forward, arrays
    out, vjp = jax.jit(functools.partial(jax.vjp, forward))(*arrays)
    d_out = jax.tree.map(lambda o: jax.random.normal(jax.random.key(1), o.shape).astype(o.dtype), out)
    return jax.jit(lambda vjp, d_out: vjp(d_out)), (vjp, d_out)


def _judge(got, want, case: Case) -> str:
    """Whether `got` may be timed. This keeps nonsense out of the table; accuracy is the tests' business."""
    if want is None:
        return "unchecked: xla gave no answer"
    # Four units in the last place of the coarsest input, taken over whole arrays. float32 counts as
    # TensorFloat-32 (10 bits of mantissa), which a GPU's matrix units may make of it.
    units = [float(jnp.finfo(a.dtype).eps) for a in case.arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    error = float(_relative_error(got, want))
    return "ok" if error <= 4 * max([*units, 2**-10]) else f"wrong: relative error {error:.1e}"


@jax.jit
def _relative_error(got, want) -> jax.Array:
    """The largest |got - want| / |want| over a tree's arrays, in Frobenius norms; NaN if either has one."""
    errors = []
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(w.dtype, jnp.floating):  # integers have cotangents without values
            g32, w32 = g.astype(jnp.float32), w.astype(jnp.float32)
            difference = jnp.linalg.norm((g32 - w32).ravel())
            errors.append(jnp.where(difference == 0, 0.0, difference / jnp.linalg.norm(w32.ravel())))
    return jnp.stack(errors).max()


def _figures(op: Op, case: Case, pass_: str, samples: list[float]) -> dict[str, str]:
    median, p20, p80 = np.percentile(samples, [50, 20, 80])
    seconds = median / 1e6
    cost = op.cost[pass_](*case.arrays, **case.static)
    figures = {
        "median_us": median, "p20_us": p20, "p80_us": p80, "tflops": cost.flops / seconds / 1e12,
        "gbps": cost.bytes / seconds / 1e9,
    }  # fmt: skip
    if gpu := hardware.by_device_kind(backend.target().kind):
        figures["of_roofline"] = cost.seconds(gpu.peak(case.arrays[0].dtype.name), gpu.bandwidth) / seconds
    return {column: f"{figure:.3f}" for column, figure in figures.items()}


def _facts(device: str) -> dict[str, str]:
    return {
        "device": device,
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str:
    """The commit checked out, "+dirty" if the tree differs beyond results/; "unknown" where git has none."""

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
    """Puts `rows` in a CSV file, in place of what it held of their ops and cases, all at once."""
    replaced = {(row["op"], row["case"]) for row in rows}
    kept = [row for row in _read(path) if (row["op"], row["case"]) not in replaced]
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
    """A line for what was measured on other source than today's, and for each kernel never timed on an H200.

    `everything`: `ops` are all there are, so that rows of other ops are of ops that are gone.
    """
    today = {op.name: measured.digest(op) for op in ops}
    lines = {}
    for path in sorted(measured.RESULTS.glob("*.csv")):
        for row in _read(path):
            if row["digest"] != today.get(row["op"]) and (everything or row["op"] in today):
                what = f"{row['op']} {row['case']} {row['implementation']}"
                lines[f"stale: {path.stem}: {what}: measured {row['date']} at {row['commit']}"] = None
    h200 = _read(measured.csv_path(hardware.H200.device_kind))
    timed = {(row["op"], row["implementation"]) for row in h200 if row["status"] == "ok"}
    missing = [(op.name, kernel) for op in ops for kernel in op.kernels if (op.name, kernel) not in timed]
    return [
        *lines,
        *(f"never measured on {hardware.H200.device_kind}: {op} {kernel}" for op, kernel in missing),
    ]


if __name__ == "__main__":
    sys.exit(main())
