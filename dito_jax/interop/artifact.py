"""Exported artifacts: a StableHLO function with its weights and a manifest with the SHA-256 of all files.

    DIR/manifest.json         kind, inputs, outputs, versions, the SHA-256 of all other files and of the manifest
    DIR/function.bin          function of (weights, *inputs), serialized by jax.export, for one or more platforms
    DIR/weights.safetensors   weights by name
    DIR/check.safetensors     inputs, and the outputs on the machine that exported
    DIR/host/                 files for a host without Python (host.py)

Only JAX, NumPy and safetensors are needed to run an artifact; this file does not import any model:

    python -m dito_jax.interop.artifact DIR
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from dito_jax.errors import USER_MISTAKE, UserError
from dito_jax.interop import host


FUNCTION, WEIGHTS, CHECK, MANIFEST = "function.bin", "weights.safetensors", "check.safetensors", "manifest.json"
FAR = 0.05  # tolerance for other hardware, as a share of the largest absolute output
CHANGED = "checksum mismatch: the file is damaged or was changed. Export the run again."
Arrays = dict[str, np.ndarray]


def write(
    directory: Path,
    exported: export.Exported,
    weights: Arrays,
    inputs: Sequence[np.ndarray],
    static: Sequence[export.Exported],
    about: dict[str, Any],
) -> None:
    """Writes all files of an artifact, the manifest last; a directory without a manifest is not an artifact.

    `static` has the function for each single platform, with the shapes of `inputs`.
    """
    serialized, outputs = exported.serialize(), jax.tree.leaves(jax.jit(exported.call)(weights, *inputs))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    (directory / FUNCTION).write_bytes(serialized)
    save_file(_plain(weights), directory / WEIGHTS)
    named = {f"input{i}": x for i, x in enumerate(inputs)} | {
        f"output{i}": np.asarray(x) for i, x in enumerate(outputs)
    }
    save_file(_plain(named), directory / CHECK)
    of_host = host.write(directory, static, directory / WEIGHTS, directory / CHECK)
    manifest = about | {
        "platforms": list(exported.platforms),
        "inputs": [str(aval) for aval in exported.in_avals[len(weights) :]],
        "outputs": [str(aval) for aval in exported.out_avals],
        "weights": {name: f"{array.dtype}{list(array.shape)}" for name, array in weights.items()},
        "checked_on": jax.default_backend(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "safetensors")},
        "files": {name: _sha256(directory / name) for name in (FUNCTION, WEIGHTS, CHECK, *of_host)},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n")


def load(directory: Path) -> tuple[export.Exported, Arrays, dict[str, Any]]:
    """Loads (function, weights, manifest); call `function.call(weights, *inputs)`.

    Raises:
      UserError: the directory is not an artifact, or the checksum of a file is wrong.
    """
    manifest = _manifest(directory)
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(f"{path}: {CHANGED}")
    return export.deserialize(bytearray((directory / FUNCTION).read_bytes())), load_file(directory / WEIGHTS), manifest


def verify(directory: Path) -> str:
    """Runs an artifact on its check inputs; returns a line with the difference to the outputs of the exporting machine.

    Raises:
      UserError: the errors of `load`; the artifact was not exported for this platform; or a result differs by more than
        rounding errors.
    """
    function, weights, manifest = load(directory)
    here = jax.default_backend().replace("gpu", "cuda")
    if here not in manifest["platforms"]:
        raise UserError(f"{directory}: exported for {', '.join(manifest['platforms'])}, but this machine has {here}.")
    held = load_file(directory / CHECK)
    inputs = [held[f"input{i}"] for i in range(sum(name.startswith("input") for name in held))]
    outputs = [np.asarray(x) for x in jax.tree.leaves(jax.jit(function.call)(weights, *inputs))]
    wanted = [held[f"output{i}"] for i in range(len(outputs))]
    intact = f"{directory}: {manifest['what']}, {len(weights)} weights: intact"
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(outputs, wanted, strict=True)):
        return f"{intact}, results are bit-identical."
    difference = max(_difference(a, b) for a, b in zip(outputs, wanted, strict=True))
    there = f"those on {manifest['checked_on']}, jaxlib {manifest['versions']['jaxlib']}"
    if not difference <= FAR:
        raise UserError(
            f"{directory}: intact, but with jaxlib {version('jaxlib')} on {here} the results differ by "
            f"{difference:.2g} of the largest value from {there}; the tolerance is {FAR}. "
            "Compare with another machine or jaxlib."
        )
    return f"{intact}; results differ by {difference:.2g} of the largest value from {there}."


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute difference, as a share of the largest wanted value; infinite if only one is not finite."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    alike = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    difference = np.abs(found[~alike] - wanted[~alike])
    furthest = float(np.max(np.where(np.isfinite(difference), difference, np.inf), initial=0.0))
    largest = float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0))
    return furthest / largest if largest else furthest and float("inf")


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory}: not an artifact ({MANIFEST}: {error}); make one with `dito export RUN -o DIR`."
        ) from error
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise UserError(
            f"{directory / MANIFEST}: no sha256 of the manifest: removed, or an older version. Export the run again."
        )
    if manifest.pop("sha256") != _digest(manifest):
        raise UserError(f"{directory / MANIFEST}: {CHANGED}")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(arrays: Arrays) -> Arrays:
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m dito_jax.interop.artifact", description="Verifies an artifact.")
    parser.add_argument("directory", metavar="DIR", type=Path)
    try:
        print(verify(parser.parse_args().directory))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_MISTAKE)
