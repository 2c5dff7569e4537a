"""What a host without Python needs of an artifact: plain files for the PJRT C API, beside those that JAX reads.

    DIR/host/PLATFORM.mlirbc   StableHLO for one platform, its shapes those of the inputs in check.safetensors
    DIR/host/options.pb        XLA's CompileOptionsProto: one device
    DIR/host/arguments.txt     a line an argument, then a line an output, in the order the module has them:
                               input|output FILE OFFSET BYTES DTYPE DIM DIM ..., the offset from the file's beginning

examples/pjrt_host is such a host.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from jax import export
from jax.core import ShapedArray

from dito_jax.errors import UserError


FOLDER = "host"
DTYPES = ("float32", "bfloat16", "float64", "int32", "uint32", "int8", "uint8", "bool")  # as main.cc has them
# CompileOptionsProto{executable_build_options{device_ordinal: -1, num_replicas: 1, num_partitions: 1}}. What jaxlib
# would serialise holds every flag of XLA as it was where the artifact was made, and they would override the host's.
OPTIONS = b"\x1a\x0f" + b"\x08" + b"\xff" * 9 + b"\x01" + b"\x20\x01" + b"\x28\x01"


def write(directory: Path, static: Sequence[export.Exported], weights: Path, check: Path) -> list[str]:
    """The files' names; `static` are functions of (weights, *inputs), one a platform, `weights` and `check` written."""
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.mlirbc"):  # of an earlier export, which may have been for more platforms
        left.unlink()
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
    held = {weights.name: _places(weights), check.name: _places(check)}
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


def _line(kind: str, file: str, place: tuple[int, int], aval: ShapedArray) -> str:
    offset, size = place
    if aval.dtype.name not in DTYPES:
        raise UserError(f"export: an array of {aval.dtype}; a host without Python takes {', '.join(DTYPES)}.")
    assert size == aval.size * aval.dtype.itemsize, f"{kind} of {aval} has {size} bytes in {file}"
    return " ".join(map(str, (kind, file, offset, size, aval.dtype, *aval.shape))) + "\n"


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each array of a safetensors file begins in it, and its bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: told["data_offsets"] for name, told in header.items()}
    return {name: (8 + length + start, end - start) for name, (start, end) in spans.items()}
