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
import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from dito_jax.errors import USER_MISTAKE, UserError
from dito_jax.interop import host
from dito_jax.interop.manifest import CHECK, FUNCTION, MANIFEST, WEIGHTS, check_replaceable, checked, sealed, sha256
from dito_jax.interop.replacing import replaced


FAR = 0.05  # tolerance for other hardware, as a share of the largest absolute output
Arrays = dict[str, np.ndarray]


def write(
    directory: Path,
    exported: export.Exported,
    weights: Arrays,
    inputs: Sequence[np.ndarray],
    static: Sequence[export.Exported],
    about: dict[str, Any],
) -> None:
    """Writes an artifact, in place of an earlier one: killed at any moment it leaves the earlier one or the new one.

    `static` has the function for each single platform, with the shapes of `inputs`.

    Raises:
      UserError: the directory has files that no artifact has.
    """
    check_replaceable(directory)
    serialized, outputs = exported.serialize(), jax.tree.leaves(jax.jit(exported.call)(weights, *inputs))
    named = {f"input{i}": x for i, x in enumerate(inputs)} | {
        f"output{i}": np.asarray(x) for i, x in enumerate(outputs)
    }
    with replaced(directory) as new:
        (new / FUNCTION).write_bytes(serialized)
        save_file(_plain(weights), new / WEIGHTS)
        save_file(_plain(named), new / CHECK)
        of_host = host.write(new, static, new / WEIGHTS, new / CHECK)
        manifest = about | {
            "platforms": list(exported.platforms),
            "inputs": [str(aval) for aval in exported.in_avals[len(weights) :]],
            "outputs": [str(aval) for aval in exported.out_avals],
            "weights": _kinds(weights),
            "checked_on": jax.default_backend(),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "safetensors")},
            "files": {name: sha256(new / name) for name in (FUNCTION, WEIGHTS, CHECK, *of_host)},
        }
        (new / MANIFEST).write_text(sealed(manifest))


def load(directory: Path) -> tuple[export.Exported, Arrays, dict[str, Any]]:
    """Loads (function, weights, manifest); call `function.call(weights, *inputs)`.

    Raises:
      UserError: the directory is not an artifact; a checksum is wrong; a file cannot be read, or it holds other arrays
        than the manifest says.
    """
    manifest = checked(directory)
    with _one_line(directory / FUNCTION, "cannot be read as a function"):
        function = export.deserialize(bytearray((directory / FUNCTION).read_bytes()))
    weights = _arrays(directory / WEIGHTS)
    if _kinds(weights) != manifest["weights"]:
        raise UserError(f"{directory / WEIGHTS}: holds other arrays than the {MANIFEST} says. Export the run again.")
    return function, weights, manifest


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
    held = _arrays(directory / CHECK)
    names = {part: [f"{part}{i}" for i in range(len(manifest[f"{part}s"]))] for part in ("input", "output")}
    if set(held) != {*names["input"], *names["output"]}:
        raise UserError(f"{directory / CHECK}: holds other arrays than the {MANIFEST} says. Export the run again.")
    inputs, wanted = ([held[name] for name in names[part]] for part in ("input", "output"))
    with _one_line(directory / FUNCTION, "cannot be run on the inputs of the check"):
        outputs = [np.asarray(x) for x in jax.tree.leaves(jax.jit(function.call)(weights, *inputs))]
    if [x.shape for x in outputs] != [x.shape for x in wanted]:
        raise UserError(f"{directory / CHECK}: holds outputs of other shapes than the function. Export the run again.")
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


def _arrays(path: Path) -> Arrays:
    with _one_line(path, "cannot be read as safetensors"):
        return load_file(path)


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """Raises a UserError for whatever a library raises because of the content of a file."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path}: {what} ({why}): it is damaged, or of another version. Export the run again."
        ) from error


def _kinds(arrays: Arrays) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _plain(arrays: Arrays) -> Arrays:
    return {name: np.array(array, order="C") for name, array in arrays.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m dito_jax.interop.artifact", description="Verifies an artifact.")
    parser.add_argument("directory", metavar="DIR", type=Path)
    try:
        print(verify(parser.parse_args().directory))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_MISTAKE)
