"""Where what was computed once from a data file is kept: a name that changes with the file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cached_path(cache_dir: str | None, file: str, *options: Any, suffix: str) -> Path:
    """The path for what is computed from `file`, as it is now, with these options (JSON).

    It is in `cache_dir`, by default $DITO_CACHE/data, or ~/.cache/dito_jax/data.
    """
    default = Path(os.environ.get("DITO_CACHE") or Path.home() / ".cache" / "dito_jax") / "data"
    folder = default if cache_dir is None else Path(cache_dir).expanduser()
    stat = os.stat(file)
    identity = json.dumps([os.path.realpath(file), stat.st_size, stat.st_mtime_ns, *options])
    return folder / f"{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:32]}{suffix}"
