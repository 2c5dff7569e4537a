"""What was compiled: the committed results/compiled/<family>.json, and whether it is of today's source and compiler.

The CUDA compiler says the same of the same source: a record whose digest is today's proves what compiling again
would. A digest covers the code of a family, what its kernels import, the block sizes that were tuned, how rows are
made, and the versions of the compilers. `python -m kernels_pallas.inspect --record` writes the records.
"""

import functools
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from .. import deviceless, measured, tuning
from ..op import Op


RECORDED = ("h200", "a100")
PACKAGE = Path(__file__).parents[1]
# What the code of every family, or its row, depends on outside the family. The test of this module holds it complete.
SHARED = (
    "op.py", "backend.py", "tuning.py", "hardware.py", "deviceless.py", "bench/inspect.py", "ffi/custom_calls.py",
    "ffi/libraries.py", "ffi/ranges.py",
)  # fmt: skip
COMPILERS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-nvvm")


def families(ops: Iterable[Op]) -> dict[str, list[Op]]:
    """The ops of each family that has a kernel of ours, by the family's name."""
    by_name: dict[str, list[Op]] = {}
    for op in ops:
        if not all(kernel.external for kernel in op.kernels.values()):
            by_name.setdefault(measured.family(op).name, []).append(op)
    return by_name


def path(family: str) -> Path:
    """results/compiled/norms.json."""
    return measured.RESULTS / "compiled" / f"{family}.json"


def digest(ops: Sequence[Op]) -> str:
    """Of a family, by its ops: of all that its rows depend on."""
    shared = [PACKAGE / name for name in SHARED]
    return measured.digest(ops[0], [*shared, *sorted(tuning.SHIPPED.glob("*.json")), *compilers()])


@functools.cache
def compilers() -> tuple[str, ...]:
    """Name and version of everything that compiles."""
    versions = [f"{name} {metadata.version(name)}" for name in COMPILERS]
    for tool in ("ptxas", "nvdisasm"):
        said = subprocess.run([deviceless.compiler(tool), "--version"], capture_output=True, text=True, check=True)
        versions.append(f"{tool} {re.findall(r'release .*', said.stdout)[0]}")
    return tuple(versions)


def is_current(family: str, ops: Sequence[Op]) -> bool:
    """Whether the family's record is of today's source and compilers."""
    return path(family).exists() and json.loads(path(family).read_text())["digest"] == digest(ops)


def read(family: str) -> list[dict]:
    """The rows of the family's record."""
    record = json.loads(path(family).read_text())
    return [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]


def write(family: str, ops: Sequence[Op], columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Makes `rows` the family's record; rows with an error are left out, and leave the record out of date."""
    complete = not any("error" in row for row in rows)
    head = {
        "digest": digest(ops) if complete else "incomplete",
        "compilers": compilers(),
        "columns": columns,
    }
    lines = [json.dumps([row[column] for column in columns]) for row in rows if "error" not in row]
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    path(family).parent.mkdir(parents=True, exist_ok=True)
    path(family).write_text(f'{{\n{text},\n "rows": [\n  {",\n  ".join(lines)}\n ]\n}}\n')
