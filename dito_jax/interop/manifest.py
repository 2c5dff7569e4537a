"""The manifest of an artifact: its form, the names of files that it may have, and the check of all files."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dito_jax.errors import UserError


FUNCTION, WEIGHTS, CHECK, MANIFEST = "function.bin", "weights.safetensors", "check.safetensors", "manifest.json"
CHANGED = "checksum mismatch: the file is damaged or was changed. Export the run again."
NAMES = re.compile(
    "|".join([*map(re.escape, (FUNCTION, WEIGHTS, CHECK)), r"host/([\w-]+\.mlirbc|options\.pb|arguments\.txt)"]),
    re.ASCII,
)
SHA256 = re.compile("[0-9a-f]{64}")
PARTS = {
    "what": str, "platforms": list, "inputs": list, "outputs": list, "weights": dict, "checked_on": str,
    "versions": dict, "files": dict,
}  # fmt: skip
AGAIN = "make one with `dito export RUN -o DIR`"


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with its own SHA-256."""
    return json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n"


def checked(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact, all files of which are as it says.

    Raises:
      UserError: the directory is not an artifact; the manifest has another form or names a file outside the directory;
        the checksum of a file is wrong; or there is a file that the manifest does not name.
    """
    manifest = _read(directory)
    for name, digest in manifest["files"].items():
        path = directory / name
        if not _is_regular(path) or sha256(path) != digest:
            raise UserError(f"{path}: {CHANGED}")
    if added := sorted(set(_files(directory)) - {MANIFEST, *manifest["files"]}):
        raise UserError(f"{directory / added[0]}: not in the {MANIFEST}: remove it, or export the run again.")
    return manifest


def check_replaceable(directory: Path) -> None:
    """Raises UserError if a directory has files that no artifact has; an export would delete them."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"export: -o {directory} is a file; give a directory.")
    for name in sorted(_files(directory)):
        if name != MANIFEST and not NAMES.fullmatch(name):
            raise UserError(
                f"export: -o {directory} has {name}, which is no file of an artifact and would be deleted: "
                "give another directory."
            )


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        if path.exists() and not _is_regular(path):
            raise OSError("not a regular file")
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{directory}: not an artifact ({MANIFEST}: {why}); {AGAIN}.") from error
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise UserError(f"{path}: no sha256 of the manifest: removed, or an older version. Export the run again.")
    if manifest.pop("sha256") != _digest(manifest):
        raise UserError(f"{path}: {CHANGED}")
    for problem in _problems(manifest):
        raise UserError(f"{path}: {problem}. Export the run again.")
    return manifest


def _problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the form of a manifest."""
    for name, kind in PARTS.items():
        if not isinstance(manifest.get(name), kind):
            yield f"its {name!r} is missing or is not a {kind.__name__}"
            return
    for name in ("platforms", "inputs", "outputs"):
        if not all(isinstance(each, str) for each in manifest[name]):
            yield f"its {name!r} has an entry that is not a text"
    if not isinstance(manifest["versions"].get("jaxlib"), str):
        yield "its 'versions' lack jaxlib"
    for name, digest in manifest["files"].items():
        if not NAMES.fullmatch(name):
            yield f"its 'files' have {name!r}, which is no file of an artifact"
        if not (isinstance(digest, str) and SHA256.fullmatch(digest)):
            yield f"its 'files' have no SHA-256 of {name}"
    for name in (FUNCTION, WEIGHTS, CHECK):
        if name not in manifest["files"]:
            yield f"its 'files' lack {name}"


def _files(directory: Path) -> Iterator[str]:
    """The names of all files in a directory, and of links to directories, relative to it."""
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*names, *links):
            yield (Path(folder) / name).relative_to(directory).as_posix()


def _is_regular(path: Path) -> bool:
    """Whether a path is a regular file and no link, so that reading it ends and reads nothing else."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and not path.parent.is_symlink()
    except OSError:
        return False


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
