"""The committed results of cross-compilation, results/compiled/<family>.json, and whether they are up to date.

Compiling the same code with the same compilers gives the same machine code, so a record whose digest is the current one
proves what compiling again would prove. The digest covers the code of the family, the code that it imports, the tuned
tile sizes, the code that makes the rows, and the versions of the compilers. `python -m kernels_pallas.inspect --record`
writes the records.
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
# The files outside a family on which its rows depend. The tests check that none is missing.
SHARED = (
    "op.py", "backend.py", "tuning.py", "hardware.py", "deviceless.py", "bench/machine_code.py", "ffi/custom_calls.py",
    "ffi/libraries.py", "ffi/ranges.py",
)  # fmt: skip
COMPILERS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-nvvm")


def families(ops: Iterable[Op]) -> dict[str, list[Op]]:
    """The ops that have kernels of this package, by the name of their family."""
    by_name: dict[str, list[Op]] = {}
    for op in ops:
        if not all(kernel.external for kernel in op.kernels.values()):
            by_name.setdefault(measured.family(op).name, []).append(op)
    return by_name


def path(family: str) -> Path:
    """results/compiled/norms.json."""
    return measured.RESULTS / "compiled" / f"{family}.json"


def digest(ops: Sequence[Op]) -> str:
    """The digest of everything that the rows of a family depend on, given the ops of the family."""
    shared = [PACKAGE / name for name in SHARED]
    return measured.digest(ops[0], [*shared, *sorted(tuning.SHIPPED.glob("*.json")), *compilers()])


@functools.cache
def compilers() -> tuple[str, ...]:
    """Name and version of each compiler, and of each package that contains one."""
    versions = [f"{name} {metadata.version(name)}" for name in COMPILERS]
    for tool in ("ptxas", "nvdisasm"):
        said = subprocess.run([deviceless.compiler(tool), "--version"], capture_output=True, text=True, check=True)
        versions.append(f"{tool} {re.findall(r'release .*', said.stdout)[0]}")
    return tuple(versions)


def is_current(family: str, ops: Sequence[Op]) -> bool:
    """Whether the record of the family was made from the current code by the current compilers."""
    return path(family).exists() and json.loads(path(family).read_text())["digest"] == digest(ops)


def read(family: str) -> list[dict]:
    """The rows in the record of the family."""
    record = json.loads(path(family).read_text())
    return [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]


def write(family: str, ops: Sequence[Op], columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes the record of the family. It stays out of date if a kernel did not compile; that kernel has no row."""
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
