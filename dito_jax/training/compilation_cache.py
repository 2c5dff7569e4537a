"""The persistent compilation cache: entries are bound to their keys, and nobody else can write to the directory.

JAX runs whatever is in the file that has the name of a key. Here each file begins with a SHA-256 of key and content, so
a file that was truncated, damaged, or copied from another key is compiled again. A checksum stops mistakes, not people:
who can write to the directory can run code in every process that reads it, so such a directory is refused.
"""

import hashlib
import logging
import os
from pathlib import Path

import jax
from jax._src import compilation_cache as of_jax  # private module of JAX: its cache object; imported in this file only
from jax._src.lru_cache import LRUCache

from dito_jax.errors import UserError


SHA256_BYTES = 32
OTHERS_WRITE = 0o022  # mode bits: group and others

logger = logging.getLogger(__name__)


class CheckedCache(LRUCache):
    """JAX's cache in a directory of the local file system, with a checksum of key and content before each entry."""

    def get(self, key: str) -> bytes | None:
        """The content of an entry; None if there is none. An entry that is not that of its key is deleted."""
        entry = super().get(key)
        if entry is None or entry[:SHA256_BYTES] == _digest(key, entry[SHA256_BYTES:]):
            return None if entry is None else entry[SHA256_BYTES:]
        logger.warning("compilation cache: %s is damaged, or not of this program: compiling again.", self._path / key)
        for path in Path(self._path).glob(f"{key}-*"):
            path.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Adds an entry, unless there is one."""
        super().put(key, _digest(key, value) + value)


def enable_compilation_cache(path: str | os.PathLike) -> None:
    """Enables the persistent compilation cache in `path`, also for programs that are small or compile quickly.

    Raises:
      UserError: the directory belongs to another user, or others can write to it.
    """
    path = Path(path).expanduser().absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(path)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX opens the cache at the first compilation and ignores later changes of the setting.
    of_jax.reset_cache()
    of_jax._cache = CheckedCache(os.fspath(path), max_size=jax.config.jax_compilation_cache_max_size)
    of_jax._cache_initialized = True


def _check_owner(path: Path) -> None:
    there = path.stat()
    cure = "set DITO_CACHE to a directory of your own"
    if there.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{path}: the compilation cache belongs to another user, who could run code in yours: {cure}.")
    if there.st_mode & OTHERS_WRITE:
        raise UserError(
            f"{path}: others can write to the compilation cache (mode {there.st_mode & 0o777:o}) and run code as "
            f"you: {cure}, or delete it and make it again with mode 700."
        )


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + content).digest()
