"""The committed benchmark results, results/<device>.csv, and whether they were measured with the current source.

A row is one op, case, implementation and pass on one device. Its `digest` identifies the source of the op's family. A
row with an old digest still ranks implementations; `python -m kernels_pallas.bench --stale` lists it as out of date.
"""

import ast
import csv
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from . import backend


RESULTS = Path(__file__).parent / "results"
SOURCES_OF_CALLS = {"ffi.py": "csrc", "cutlass.py": "csrc/cutlass"}
COLUMNS: tuple[str, ...] = (
    "op", "case", "pass", "implementation", "status", "median_us", "p20_us", "p80_us", "tflops", "gbps",
    "of_roofline", "copy_gbps", "device", "jax", "jaxlib", "commit", "date", "digest",
)  # fmt: skip


@functools.cache
def rows(device: str) -> tuple[dict[str, str], ...]:
    """All committed rows of a device kind, e.g. "NVIDIA H200"; empty if the device has no results."""
    path = csv_path(device)
    if not path.exists():
        return ()
    with path.open() as lines:
        return tuple(csv.DictReader(lines))


def csv_path(device: str) -> Path:
    """results/nvidia_h200.csv for "NVIDIA H200"."""
    return RESULTS / f"{device.lower().replace(' ', '_')}.csv"


def family(op) -> Path:
    """The folder of the op's family."""
    return Path(str(sys.modules[op.reference.__module__].__file__)).parent


def digest(op, more: Iterable[Path | str] = ()) -> str:
    """Twelve hex digits that change with the code of the op's family or with the code that all families share.

    The sources of custom calls count for the families that have a custom call. Comments, docstrings and formatting of
    Python code do not count.

    Args:
      more: further files, and text, that the digest depends on.
    """
    package, text = Path(__file__).parent, hashlib.sha256()
    shared = sorted((package / "pallas").glob("*.py"))
    for file, folder in SOURCES_OF_CALLS.items():
        if (family(op) / file).exists():
            shared += sorted(path for path in (package / folder).iterdir() if path.is_file())
    for part in [*sorted(family(op).glob("*.py")), *shared, *more]:
        words = (part.name.encode(), content(part)) if isinstance(part, Path) else (part.encode(),)
        text.update(b"\0".join(words) + b"\0")
    return text.hexdigest()[:12]


def content(path: Path) -> bytes:
    """What counts of a file: the syntax tree of Python code without docstrings, all bytes of another file."""
    return _code(path.read_bytes()) if path.suffix == ".py" else path.read_bytes()


@functools.cache
def _code(source: bytes) -> bytes:
    return repr(_tree(ast.parse(source))).encode()


def _tree(node):
    """A syntax tree as nested tuples without docstrings and empty fields, which is the same in all Python versions."""
    if isinstance(node, list):
        return [_tree(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    fields = ((name, _tree(value)) for name, value in ast.iter_fields(node))
    return type(node).__name__, *((name, value) for name, value in fields if value is not None and value != [])


def fastest(op, names: list[str], arrays, static) -> str | None:
    """The one of `names` with the least time, summed over its passes, at exactly these shapes; None if not measured."""
    device = backend.target().kind
    if not rows(device) or (case := op.case_named(arrays, static)) is None:
        return None
    seconds: dict[str, dict[str, float]] = {}
    for row in rows(device):
        if (row["op"], row["case"], row["status"]) == (op.name, case, "ok") and row["pass"] in op.passes:
            seconds.setdefault(row["implementation"], {})[row["pass"]] = float(row["median_us"])
    complete = {n: sum(s.values()) for n, s in seconds.items() if n in names and len(s) == len(op.passes)}
    return min(complete, key=complete.__getitem__) if len(complete) > 1 else None


def passed(op, implementation: str) -> bool:
    """Whether this device's results of the current source have an "ok" row of the implementation and no failed one.

    An "unchecked" row, for which there was no reference to compare with, counts as neither.
    """
    today = digest(op)
    key = lambda row: (row["op"], row["implementation"], row["digest"])
    states = [r["status"] for r in rows(backend.target().kind) if key(r) == (op.name, implementation, today)]
    return "ok" in states and all(state == "ok" or state.startswith("unchecked") for state in states)
