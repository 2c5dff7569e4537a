"""An ahead-of-time artifact: a compiled function's StableHLO, its weights, and a manifest that vouches for both.

    DIR/manifest.json         what it is, what goes in and comes out, versions, and the sha256 of the other files
    DIR/function.bin          jax.export's serialized function of (weights, *inputs), one platform or several
    DIR/weights.safetensors   its weights, by name
    DIR/check.safetensors     inputs, and what came out where it was made
    DIR/host/                 the same for a host without Python, which host.py tells of

Whoever has JAX, NumPy and safetensors runs it; this file knows nothing of models, nor does what it imports:

    python -m dito_jax.interop.artifact DIR
"""

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
Arrays = dict[str, np.ndarray]


def write(
    directory: Path,
    exported: export.Exported,
    weights: Arrays,
    inputs: Sequence[np.ndarray],
    static: Sequence[export.Exported],
    about: dict[str, Any],
) -> None:
    """All of its files, the manifest last: without it there is no artifact.

    `static` is the function again, for each platform alone, with the shapes of `inputs`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    (directory / FUNCTION).write_bytes(exported.serialize())
    save_file(_plain(weights), directory / WEIGHTS)
    outputs = jax.tree.leaves(jax.jit(exported.call)(weights, *inputs))
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
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load(directory: Path) -> tuple[export.Exported, Arrays, dict[str, Any]]:
    """(function, weights, manifest); `function.call(weights, *inputs)`.

    Raises:
      UserError: it is no artifact, or a file is not as it was written.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        wanted = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{directory}: no artifact ({MANIFEST}: {error}); `dito export RUN -o DIR` makes one."
        ) from error
    for name, digest in wanted.items():
        path = directory / name
        if not path.exists() or _sha256(path) != digest:
            raise UserError(f"{path}: not as it was written: damaged, or changed. Export the run again.")
    return export.deserialize(bytearray((directory / FUNCTION).read_bytes())), load_file(directory / WEIGHTS), manifest


def verify(directory: Path) -> str:
    """Runs it on the inputs it came with; says how near the results are to those of where it was made.

    Raises:
      UserError: as `load`; this machine's platform is not among those it was exported for; or, on the platform where it
        was checked, a result is not the same to the bit.
    """
    function, weights, manifest = load(directory)
    here = jax.default_backend().replace("gpu", "cuda")
    if here not in manifest["platforms"]:
        raise UserError(f"{directory}: exported for {', '.join(manifest['platforms'])}, and this machine has {here}.")
    held = load_file(directory / CHECK)
    inputs = [held[f"input{i}"] for i in range(sum(name.startswith("input") for name in held))]
    outputs = [np.asarray(x) for x in jax.tree.leaves(jax.jit(function.call)(weights, *inputs))]
    wanted = [held[f"output{i}"] for i in range(len(outputs))]
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(outputs, wanted, strict=True))
    if same:
        return f"{directory}: {manifest['what']}, {len(weights)} weights: intact, results the same to the bit."
    furthest = max(float(np.max(np.abs(a.astype(np.float64) - b))) for a, b in zip(outputs, wanted, strict=True))
    said = f"results differ by up to {furthest:.3g} from those on {manifest['checked_on']}"
    if manifest["checked_on"] == jax.default_backend() and manifest["versions"]["jaxlib"] == version("jaxlib"):
        raise UserError(f"{directory}: {said}, the same platform and version. Export the run again.")
    return f"{directory}: {manifest['what']}, {len(weights)} weights: intact; {said} of jaxlib {version('jaxlib')}."


def _plain(arrays: Arrays) -> Arrays:
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    try:
        print(verify(Path(sys.argv[1])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_MISTAKE)
