"""Cross-compiles every kernel (no GPU needed) and reports registers, spills, shared memory and instructions.

    python -m kernels_pallas.inspect [op ...] [--case NAME] [--kernel NAME] [--device h200] [--json]
    python -m kernels_pallas.inspect --record [op ...]

There is one row per GPU function. Forward and backward are compiled separately; a backward of two kernels gives two
rows, and XLA numbers a function name that occurs again (`name__1`). The columns:
  registers            per thread, from `ptxas -v`; where warpgroups reallocate registers, the number at launch
  spill_bytes          per thread, spill stores and loads, from `ptxas -v`
  shared_memory_bytes  per block: static shared memory from `ptxas -v`, plus dynamic shared memory (all of it, for
                       Triton kernels) from the list of launches that XLA writes beside the PTX
  wgmma                Hopper's warpgroup matrix instructions in the PTX
  mma_sync, tcgen05    the matrix instructions of Ampere and of Blackwell in the PTX
  cp_async             asynchronous copies to shared memory in the PTX
  wide_share           the share of 128-bit accesses among the loads and stores of global memory (LDG, STG) in the
                       machine code; empty if there are none, as with TMA
  machine_code         the number of machine instructions and a hash of them: equal if a change has no effect on them
A kernel that does not compile, for example because it needs too much shared memory, has a row with `error` instead,
and the exit code is 1. A kernel that does not support the device or the case is named on stderr and has no row.
Kernels of other libraries are left out.

`--record` writes the rows of whole families to results/compiled/, which the test suite reads instead of compiling: of
the families of the named ops, or by default of the families whose record is out of date (see compiled.py).
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from .. import OPS, deviceless
from ..hardware import GPUS
from ..op import Op
from . import command_line, compiled
from .machine_code import dump_ptx_to, functions_of


COLUMNS = (
    "op", "kernel", "case", "pass", "function", "registers", "spill_bytes", "shared_memory_bytes", "wgmma",
    "mma_sync", "tcgen05", "cp_async", "wide_share", "machine_code", "device",
)  # fmt: skip


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = command_line.parser("inspect", __doc__)
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel implementation, e.g. triton")
    parser.add_argument("--device", default="h200", metavar="|".join(GPUS), help="GPU to compile for (default: h200)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--record", action="store_true", help="write the rows of whole families to results/compiled/")
    args = parser.parse_args()
    ops = command_line.choose_ops(parser, args, OPS)
    kernels = {name: None for op in ops for name in op.kernels}
    if args.kernel is not None and args.kernel not in kernels:
        parser.error(f"no kernel named {args.kernel!r}; choose from {', '.join(kernels)}.")
    if args.record and (args.kernel or args.case):
        parser.error("--record writes whole families; it takes neither --kernel nor --case.")

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        dump_ptx_to(dump)
        try:
            meshes = {gpu: deviceless.mesh(gpu) for gpu in (compiled.RECORDED if args.record else (args.device,))}
        except ValueError as error:
            parser.error(str(error))
        of_op = lambda op: [row for gpu, mesh in meshes.items() for row in _rows_of_op(op, gpu, mesh, dump, args)]
        rows = _record(ops, of_op, args) if args.record else [row for op in ops for row in of_op(op)]
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return int(any("error" in row for row in rows))


def _record(ops: Sequence[Op], of_op: Callable[[Op], list[dict]], args: argparse.Namespace) -> list[dict]:
    """Writes the records of the families of `ops`; if no op is named, only those that are out of date."""
    rows = []
    for name, family in compiled.families(OPS).items():
        if any(op in ops for op in family) and (args.ops or not compiled.is_current(name, family)):
            found = [row for op in family for row in of_op(op)]
            compiled.write(name, family, COLUMNS, found)
            rows += found
    return rows


def _rows_of_op(op: Op, device: str, mesh: jax.sharding.Mesh, dump: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of the op's own kernels at its cases, as far as the command line asks for them."""
    chosen = [
        (kernel, case)
        for kernel, case in itertools.product(op.kernels, op.cases)
        if not op.kernels[kernel].external and args.kernel in (None, kernel) and args.case in (None, case)
    ]
    print(f"{op.name}: compiling {len(chosen)} pairs of a kernel and a case for {device}", file=sys.stderr)
    return [row for kernel, case in chosen for row in _rows(op, kernel, case, device, mesh, dump)]


def _rows(op: Op, kernel: str, case: str, device: str, mesh: jax.sharding.Mesh, dump: Path) -> list[dict]:
    """The rows of every GPU function in both passes of one kernel at one case."""
    rows = []
    arrays, static = op.cases[case].arrays, op.cases[case].static
    with jax.set_mesh(mesh):  # Pallas takes the target GPU from the mesh
        if reason := op.kernels[kernel].unsupported(*arrays, **static):
            print(f"{op.name} {kernel} {case}: skipped: {reason}", file=sys.stderr)
            return []
        for pass_ in op.passes:
            start = time.monotonic()
            head = {"op": op.name, "kernel": kernel, "case": case, "pass": pass_}
            try:
                found = functions_of(op.name, op.kernels[kernel], op.cases[case], pass_, GPUS[device], mesh, dump)
            except Exception as error:  # any error: the other kernels still get their rows
                found = [{"error": command_line.one_line(error)}]
            found = found or [{"error": f"no GPU function whose name starts with {op.name!r}"}]
            rows += [{**head, **row, "device": device} for row in found]
            print(*head.values(), f"{time.monotonic() - start:.1f} s", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as an aligned table; a row with spills or an error ends with a note."""
    lines = [COLUMNS] + [tuple(str(row.get(column, "")) for column in COLUMNS) for row in rows]
    notes = [""] + [row.get("error") or ("spills" if row["spill_bytes"] else "") for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(aligned, notes, strict=True))
