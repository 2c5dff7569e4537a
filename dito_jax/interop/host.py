"""Files of an artifact for a host program without Python, which uses the PJRT C API.

    DIR/host/PLATFORM.mlirbc   StableHLO for one platform, with the shapes of the inputs in check.safetensors
    DIR/host/options.pb        XLA's CompileOptionsProto for one device
    DIR/host/arguments.txt     one line per argument, then one per output, in the order of the module:
                               input|output FILE OFFSET BYTES DTYPE DIM DIM ..., OFFSET in bytes from the file's start

examples/pjrt_host is an example of such a host program.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from jax import export
from jax.core import ShapedArray

from dito_jax.errors import UserError


FOLDER = "host"
DTYPES = ("float32", "bfloat16", "float64", "int32", "uint32", "int8", "uint8", "bool")  # as in main.cc
# CompileOptionsProto{executable_build_options{device_ordinal: -1, num_replicas: 1, num_partitions: 1}}. The
# options that jaxlib serializes contain all XLA flags of the exporting machine, which would override the host's.
OPTIONS = b"\x1a\x0f" + b"\x08" + b"\xff" * 9 + b"\x01" + b"\x20\x01" + b"\x28\x01"


def write(directory: Path, static: Sequence[export.Exported], weights: Path, check: Path) -> list[str]:
    """Writes the host files; returns their names. `static` has one function of (weights, *inputs) per platform;
    `weights` and `check` are files that are written already.
    """
    folder = directory / FOLDER
    folder.mkdir()
    for function in static:
        (platform,) = function.platforms
        (folder / f"{platform}.mlirbc").write_bytes(function.mlir_module_serialized)
    (folder / "options.pb").write_bytes(OPTIONS)
    lines = {_arguments(function, weights, check) for function in static}
    assert len(lines) == 1, "every platform has the same arguments"
    (folder / "arguments.txt").write_text(lines.pop())
    programs = sorted(path.name for path in folder.glob("*.mlirbc"))
    return [f"{FOLDER}/{name}" for name in (*programs, "options.pb", "arguments.txt")]


def _arguments(function: export.Exported, weights: Path, check: Path) -> str:
    held = {weights.name: _offsets(weights), check.name: _offsets(check)}
    of_weights, *of_inputs = jax.tree.unflatten(function.in_tree, range(len(function.in_avals)))[0]
    index_to_name = {index: (weights.name, name) for name, index in of_weights.items()}
    index_to_name |= {index: (check.name, f"input{i}") for i, index in enumerate(of_inputs)}
    lines = []
    for index in function.module_kept_var_idx:
        file, name = index_to_name[index]
        lines.append(("input", file, held[file][name], function.in_avals[index]))
    for index, aval in enumerate(function.out_avals):
        lines.append(("output", check.name, held[check.name][f"output{index}"], aval))
    return "".join(_line(*line) for line in lines)


def _line(kind: str, file: str, span: tuple[int, int], aval: ShapedArray) -> str:
    offset, size = span
    if aval.dtype.name not in DTYPES:
        raise UserError(f"export: an array has dtype {aval.dtype}; a host without Python supports {', '.join(DTYPES)}.")
    assert size == aval.size * aval.dtype.itemsize, f"{kind} of {aval} has {size} bytes in {file}"
    return " ".join(map(str, (kind, file, offset, size, aval.dtype, *aval.shape))) + "\n"


def _offsets(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, number of bytes) of each array in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + start, end - start) for name, (start, end) in spans.items()}
