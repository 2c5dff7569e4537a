"""The committed benchmark results, results/<device>.csv, and whether they were measured with the current source.

A row is one op, case, implementation and pass on one device. Its `digest` identifies the source of the op's family. A
row with an old digest still ranks implementations; `python -m kernels_pallas.bench --stale` lists it as out of date.
"""

import csv
import functools
import hashlib
import sys
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


def digest(op) -> str:
    """Twelve hex digits that change with any line of the op's family, or of what all kernels of a road share.

    Sources of custom calls are shared by the families that have one of their library.
    """
    family = Path(str(sys.modules[op.reference.__module__].__file__)).parent
    package, text = Path(__file__).parent, hashlib.sha256()
    shared = sorted((package / "pallas").glob("*.py"))
    for road, folder in SOURCES_OF_CALLS.items():
        if (family / road).exists():
            shared += sorted(path for path in (package / folder).iterdir() if path.is_file())
    for path in [*sorted(family.glob("*.py")), *shared]:
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return text.hexdigest()[:12]


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
