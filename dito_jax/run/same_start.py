"""Comparison of all processes at the start of a run: config, code, package versions, JAX flags and saved steps.

Processes with different options train together without an error, and what they save is damaged: each has other
parameters. Each process publishes digests only, because anybody can read the key-value store.
"""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import dito_jax
import kernels_pallas
from dito_jax import bundled
from dito_jax.checkpointing.checksums import saved_steps
from dito_jax.distributed import count, gather
from dito_jax.errors import UserError


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
JOIN_SECONDS = 900.0
PAUSES = (2.0, 4.0, 8.0, 16.0, 32.0)  # seconds; NFS may show a new directory to other hosts a minute late


def check_same_start(config: str, checkpoints: Path) -> None:
    """Compares what determines the training of each process: its config as JSON, its code, the checkpoints it sees.

    All processes must call it, before they write.

    Raises:
      UserError: a process differs from process 0; the message names what.
    """
    if count() == 1:
        return
    texts = gather(json.dumps(_digests(config)), "the start", seconds=JOIN_SECONDS)
    if line := difference(list(map(json.loads, texts))):
        raise UserError(line)
    _check_steps(checkpoints)


def difference(digests: Sequence[dict[str, str]]) -> str | None:
    """One line that names what differs between the first process and another one; None if all are the same."""
    for process, its in enumerate(digests):
        names = [name for name in digests[0] | its if digests[0].get(name) != its.get(name)]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            return (
                f"process {process} differs from process 0 in {', '.join(names[:5])}{more}: start all processes with "
                "the same options, code and package versions."
            )
    return None


def _digests(config: str) -> dict[str, str]:
    fields = jax.tree.leaves_with_path(json.loads(config), is_leaf=lambda value: not isinstance(value, dict))
    parts = {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in fields}
    parts |= {f"package {name}": importlib.metadata.version(name) for name in PACKAGES}
    parts |= {"Python": platform.python_version()}
    parts |= {f"flag {name}": str(getattr(jax.config, name)) for name in FLAGS}
    found = {name: _sha256(json.dumps(value).encode()) for name, value in parts.items()}
    for package in (dito_jax, kernels_pallas):
        assert package.__file__ is not None
        found[f"code of {package.__name__}"] = _code_digest(Path(package.__file__).parent)
    return found | {"train.py": _sha256(bundled.TRAIN.read_bytes())}


def _check_steps(checkpoints: Path) -> None:
    """Waits until all processes see the same saved steps.

    Raises:
      UserError: they still differ after a minute.
    """
    for pause in (*PAUSES, None):
        seen = gather(json.dumps(saved_steps(checkpoints)), "the list of checkpoints", seconds=JOIN_SECONDS)
        if len(set(seen)) == 1:
            return
        if pause is not None:
            time.sleep(pause)
    other = next(process for process, text in enumerate(seen) if text != seen[0])
    raise UserError(
        f"{checkpoints}: process 0 sees checkpoints of the steps {seen[0]}, process {other} of {seen[other]}: wanted "
        "one run directory on a file system that all processes share."
    )


def _code_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*.py"))
    return _sha256(b"".join(_sha256(str(f.relative_to(folder)).encode() + f.read_bytes()).encode() for f in files))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
