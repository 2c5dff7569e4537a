"""Cross-compiles one pass of a kernel (no GPU needed) and reads what the compilers report of its GPU functions.

The columns of a row are described in inspect.py.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax

from .. import deviceless
from ..hardware import Hardware
from ..op import Case, Kernel


INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma_sync": r"\bmma\.sync\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "cp_async": r"\bcp\.async\.(?:ca|cg|bulk)\b(?!\.(?:commit|wait))",
}


def dump_ptx_to(folder: Path) -> None:
    """Makes XLA and Mosaic write PTX and launches to `folder`. XLA reads its flags once, before the first compile."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    # Only PTX: with every emitter dumped, Triton's passes alone take megabytes and seconds per kernel.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_emitter_re=ptx"
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no GPU, and this leaves a GPU free for others
    jax.config.update("jax_enable_compilation_cache", False)  # a kernel from the cache writes no PTX


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
            "machine_code": _hash(machine),
        }


def _wide_share(machine: str) -> float | None:
    """The share of 128-bit accesses among the global loads and stores in machine code; None if there are none."""
    moves = re.findall(r"\b(?:LDG|STG)\.\S*", machine)
    return round(sum(".128" in move for move in moves) / len(moves), 3) if moves else None


def _hash(machine: str) -> str:
    """The number of instructions in a disassembly and a hash of them, without addresses, names and tables."""
    # nvdisasm ends an instruction with a semicolon; the listing that Mosaic GPU writes ends it with the line. The lines
    # of tables have addresses too, and start with a dot.
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^.\s][^;\n]*(?:;|$))", machine, re.MULTILINE)
    return f"{len(instructions)}:{hashlib.sha256('\n'.join(instructions).encode()).hexdigest()[:12]}"


def _output(command: list) -> str:
    """The output of a compiler command, stdout and stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
