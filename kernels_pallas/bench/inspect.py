"""Compiles every kernel for a GPU that is not there, and shows what NVIDIA's assembler made of it.

    python -m kernels_pallas.inspect [op ...] [--case NAME] [--kernel NAME] [--device h200] [--json]
    python -m kernels_pallas.inspect --record [op ...]

One row a GPU function, forward and backward compiled apart: a backward of two kernels gives two rows, and
XLA numbers a name that occurs again (`name__1`). What a row holds, and where it is from:
  registers            a thread's, from `ptxas -v`; where warpgroups divide them anew, what it is launched with
  spill_bytes          a thread's stores and loads of registers that did not fit, from `ptxas -v`
  shared_memory_bytes  a block's: the static part from `ptxas -v`, and the part asked for at launch, where
                       all of Triton's is, from the list of launches that XLA writes beside the PTX
  wgmma                Hopper's matrix instructions in the PTX (a warp group's, asynchronous)
  mma_sync, tcgen05    Ampere's and Blackwell's
  cp_async             asynchronous copies to shared memory in the PTX
  wide_share           of the loads and stores of global memory in the machine code (LDG, STG), those of 128 bits; empty
                       where there are none, as with TMA
  machine_code         how many instructions, and a hash of them: equal where a change to the source changed none
A kernel that does not compile, for want of shared memory among others, has a row with `error` instead, and
the exit code is 1. One that calls itself unsupported on the device is named on stderr and has no row; a library's
has neither. `--record` writes the rows of whole families to results/compiled/, by default of those whose source or
whose compiler has changed since (compiled.py): the test suite compiles what is not recorded.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from .. import OPS, deviceless
from ..hardware import GPUS, Hardware
from ..op import Case, Kernel, Op
from . import command_line, compiled


COLUMNS = (
    "op", "kernel", "case", "pass", "function", "registers", "spill_bytes", "shared_memory_bytes", "wgmma",
    "mma_sync", "tcgen05", "cp_async", "wide_share", "machine_code", "device",
)  # fmt: skip
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma_sync": r"\bmma\.sync\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "cp_async": r"\bcp\.async\.(?:ca|cg|bulk)\b(?!\.(?:commit|wait))",
}


def main() -> int:
    """The command; its exit code."""
    parser = command_line.parser("inspect", __doc__)
    parser.add_argument("--kernel", metavar="NAME", help="only the kernel of this name, e.g. triton")
    parser.add_argument("--device", default="h200", metavar="|".join(GPUS), help="the GPU to compile for")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--record", action="store_true", help="compile whole families for each GPU that is recorded")
    args = parser.parse_args()
    ops = command_line.choose_ops(parser, args, OPS)
    kernels = {name: None for op in ops for name in op.kernels}
    if args.kernel is not None and args.kernel not in kernels:
        parser.error(f"no kernel named {args.kernel!r}; choose from {', '.join(kernels)}.")
    if args.record and (args.kernel or args.case):
        parser.error("--record is of whole families: no --kernel, no --case.")

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        dump_ptx_to(dump)
        try:
            meshes = {gpu: deviceless.mesh(gpu) for gpu in (compiled.RECORDED if args.record else (args.device,))}
        except ValueError as error:
            parser.error(str(error))
        of_op = lambda op: [row for gpu, mesh in meshes.items() for row in _rows_of(op, gpu, mesh, dump, args)]
        rows = _recorded(ops, of_op, args) if args.record else [row for op in ops for row in of_op(op)]
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return int(any("error" in row for row in rows))


def _recorded(ops: Sequence[Op], of_op: Callable[[Op], list[dict]], args: argparse.Namespace) -> list[dict]:
    """Writes the rows of the families of `ops`; without names, of those whose record is not of today."""
    rows = []
    for name, family in compiled.families(OPS).items():
        if any(op in ops for op in family) and (args.ops or not compiled.is_current(name, family)):
            found = [row for op in family for row in of_op(op)]
            compiled.write(name, family, [column for column in COLUMNS if column != "error"], found)
            rows += found
    return rows


def _rows_of(op: Op, device: str, mesh: jax.sharding.Mesh, dump: Path, args: argparse.Namespace) -> list[dict]:
    rows = []
    for kernel, case in itertools.product(op.kernels, op.cases):
        if args.kernel in (None, kernel) and args.case in (None, case) and not op.kernels[kernel].external:
            rows += _rows(op, kernel, case, device, mesh, dump)
    return rows


def dump_ptx_to(folder: Path) -> None:
    """Makes XLA write PTX and launches to `folder`; it reads its flags once, before the first compile. Mosaic too."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    # Only PTX: with every emitter dumped, Triton's own passes alone are megabytes and seconds a kernel.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_emitter_re=ptx"
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no GPU, and leaves one to those who do
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache writes no PTX


def _rows(op: Op, kernel: str, case: str, device: str, mesh: jax.sharding.Mesh, dump: Path) -> list[dict]:
    """Every GPU function of both passes of one kernel at one case."""
    rows = []
    arrays, static = op.cases[case].arrays, op.cases[case].static
    with jax.set_mesh(mesh):  # Pallas reads the GPU to compile for off it
        if reason := op.kernels[kernel].unsupported(*arrays, **static):
            print(f"{op.name} {kernel} {case}: skipped: {reason}", file=sys.stderr)
            return []
        for pass_ in op.passes:
            start = time.monotonic()
            head = {"op": op.name, "kernel": kernel, "case": case, "pass": pass_}
            try:
                found = functions_of(op.name, op.kernels[kernel], op.cases[case], pass_, GPUS[device], mesh, dump)
            except Exception as error:  # whatever it is, the other kernels still have their rows
                found = [{"error": command_line.one_line(error)}]
            found = found or [{"error": f"no GPU function whose name starts with {op.name!r}"}]
            rows += [{**head, **row, "device": device} for row in found]
            print(*head.values(), f"{time.monotonic() - start:.1f} s", file=sys.stderr)
    return rows


def functions_of(
    prefix: str, kernel: Kernel, case: Case, pass_: str, gpu: Hardware, mesh: jax.sharding.Mesh, dump: Path
) -> list[dict]:
    """A row for each GPU function of one pass whose name starts with `prefix`, compiled for `gpu`, the mesh's."""
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
    """What one compile's dump says of each GPU function whose name starts with `prefix`: ours, not XLA's."""
    launches = "\n".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    at_launch = dict(re.findall(r"(\w+) grid: .*shared_memory: (\d+)", launches))
    for ptx in sorted(dump.glob("*.ptx")):
        text = ptx.read_text()
        names = re.findall(r"\.visible \.entry (\w+)", text)  # one a file, or none where it holds constants
        if not names or not names[0].startswith(prefix):
            continue
        [name] = names
        if (mosaic := ptx.with_suffix(".ptxas")).exists():  # Mosaic assembles by itself, and leaves the log
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
            "machine_code": _hash(machine),
        }


def _wide_share(machine: str) -> float | None:
    """Of the loads and stores of global memory in machine code, those of 128 bits; None where there are none."""
    moves = re.findall(r"\b(?:LDG|STG)\.\S*", machine)
    return round(sum(".128" in move for move in moves) / len(moves), 3) if moves else None


def _hash(machine: str) -> str:
    """Of the instructions of a disassembly alone, without addresses, names and tables; before it, how many."""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*;)", machine)
    return f"{len(instructions)}:{hashlib.sha256('\n'.join(instructions).encode()).hexdigest()[:12]}"


def _output(command: list) -> str:
    """What a command of the compiler says, on either stream."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(rows: list[dict]) -> str:
    """The rows in columns, with a trailing word where something is wrong."""
    lines = [COLUMNS] + [tuple(str(row.get(column, "")) for column in COLUMNS) for row in rows]
    notes = [""] + [row.get("error") or ("spills" if row["spill_bytes"] else "") for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(aligned, notes, strict=True))


if __name__ == "__main__":
    sys.exit(main())
