"""Cross-compiles every kernel (no GPU needed) and reports registers, spills, shared memory and instructions.

    python -m kernels_pallas.inspect [op ...] [--case NAME] [--kernel NAME] [--device h200] [--json]

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
A kernel that does not compile, for example because it needs too much shared memory, has a row with `error` instead,
and the exit code is 1. A kernel that does not support the device or the case is named on stderr and has no row.
Kernels of other libraries are left out.
"""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from .. import OPS, deviceless
from ..hardware import GPUS, Hardware
from ..op import Case, Kernel, Op
from . import command_line


COLUMNS = (
    "op", "kernel", "case", "pass", "function", "registers", "spill_bytes", "shared_memory_bytes", "wgmma",
    "mma_sync", "tcgen05", "cp_async", "wide_share", "device",
)  # fmt: skip
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma_sync": r"\bmma\.sync\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "cp_async": r"\bcp\.async\.(?:ca|cg|bulk)\b(?!\.(?:commit|wait))",
}


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = command_line.parser("inspect", __doc__)
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel implementation, e.g. triton")
    parser.add_argument("--device", default="h200", metavar="|".join(GPUS), help="GPU to compile for (default: h200)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    args = parser.parse_args()
    ops = command_line.choose_ops(parser, args, OPS)
    kernels = {name: None for op in ops for name in op.kernels}
    if args.kernel is not None and args.kernel not in kernels:
        parser.error(f"no kernel named {args.kernel!r}; choose from {', '.join(kernels)}.")

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        dump_ptx_to(dump)
        try:
            mesh = deviceless.mesh(args.device)
        except ValueError as error:
            parser.error(str(error))
        chosen = [
            (op, kernel, case)
            for op in ops
            for kernel, case in itertools.product(op.kernels, op.cases)
            if not op.kernels[kernel].external and args.kernel in (None, kernel) and args.case in (None, case)
        ]
        print(f"compiling {len(chosen)} pairs of a kernel and a case for {args.device}", file=sys.stderr)
        rows = [row for each in chosen for row in _rows(*each, args.device, mesh, dump)]
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return int(any("error" in row for row in rows))


def dump_ptx_to(folder: Path) -> None:
    """Makes XLA and Mosaic write PTX and launches to `folder`. XLA reads its flags once, before the first compile."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    # Only PTX: with every emitter dumped, Triton's passes alone take megabytes and seconds per kernel.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_emitter_re=ptx"
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no GPU, and this leaves a GPU free for others
    jax.config.update("jax_enable_compilation_cache", False)  # a kernel from the cache writes no PTX


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


def functions_of(
    prefix: str, kernel: Kernel, case: Case, pass_: str, gpu: Hardware, mesh: jax.sharding.Mesh, dump: Path
) -> list[dict]:
    """The rows of the GPU functions of one pass whose names start with `prefix`, compiled for `gpu`, the mesh's GPU."""
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir()
    _compile(kernel, case, pass_, mesh)
    return sorted(_functions(prefix, dump, gpu.arch), key=lambda row: row["function"])


def _compile(kernel: Kernel, case: Case, pass_: str, mesh: jax.sharding.Mesh) -> None:
    forward = functools.partial(kernel.forward, **case.static)
    if pass_ == "forward":
        function, arguments = forward, case.arrays
    else:
        out, residuals = jax.eval_shape(forward, *case.arrays)
        function, arguments = functools.partial(kernel.backward, **case.static), (residuals, out)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    jax.jit(function, in_shardings=replicated).lower(*arguments).compile()


def _functions(prefix: str, dump: Path, arch: str) -> Iterator[dict]:
    """The rows of the GPU functions in one dump whose names start with `prefix`: our kernels, not XLA's."""
    launches = "\n".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    at_launch = dict(re.findall(r"(\w+) grid: .*shared_memory: (\d+)", launches))
    for ptx in sorted(dump.glob("*.ptx")):
        text = ptx.read_text()
        names = re.findall(r"\.visible \.entry (\w+)", text)  # one per file, none in a file of constants
        if not names or not names[0].startswith(prefix):
            continue
        [name] = names
        if (mosaic := ptx.with_suffix(".ptxas")).exists():  # Mosaic runs ptxas itself and leaves its log
            log, machine = mosaic.read_text(), ptx.with_suffix(".sass_ctrl").read_text()
            [asked] = re.findall(r"smem_scratch_bytes=(\d+)", ptx.with_suffix(".resources.txt").read_text())
        else:
            cubin, asked = ptx.with_suffix(".cubin"), at_launch[name]
            log = _output([deviceless.compiler("ptxas"), f"-arch={arch}", "-v", ptx, "-o", cubin])
            machine = _output([deviceless.compiler("nvdisasm"), cubin])
        [registers] = re.findall(r"Used (\d+) registers", log)
        static = sum(map(int, re.findall(r"(\d+) bytes smem", log)))
        yield {
            "function": name.removesuffix("_mosaic_gpu_kernel"),
            "registers": int(registers),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "shared_memory_bytes": int(asked) + static,
            **{key: len(re.findall(pattern, text)) for key, pattern in INSTRUCTIONS.items()},
            "wide_share": _wide_share(machine),
        }


def _wide_share(machine: str) -> float | None:
    """The share of 128-bit accesses among the global loads and stores in machine code; None if there are none."""
    moves = re.findall(r"\b(?:LDG|STG)\.\S*", machine)
    return round(sum(".128" in move for move in moves) / len(moves), 3) if moves else None


def _output(command: list) -> str:
    """The output of a compiler command, stdout and stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(rows: list[dict]) -> str:
    """The rows as an aligned table; a row with spills or an error ends with a note."""
    lines = [COLUMNS] + [tuple(str(row.get(column, "")) for column in COLUMNS) for row in rows]
    notes = [""] + [row.get("error") or ("spills" if row["spill_bytes"] else "") for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(aligned, notes, strict=True))
