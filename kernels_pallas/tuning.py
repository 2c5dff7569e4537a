"""Look-up of the block sizes of a kernel: those that autotuning found to be fastest, else the family's default.

A kernel calls `blocks` when it is traced. The first of these sources that exists is used:
  1. `trying`, which a search or a test sets;
  2. the user's own file: the one that DITO_TUNED names, else ~/.cache/dito_jax/tuned/<device>.json;
  3. the committed file tuned/<device>.json;
  4. the entry of the nearest size in these files, which is logged once;
  5. the default.

`python -m kernels_pallas.tune` searches and writes these files. A file that cannot be read, or an entry that this
version does not know, is logged in one line and ignored. A change to a file takes effect in the next process.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from . import backend


log = logging.getLogger("kernels_pallas")

SHIPPED = Path(__file__).parent / "tuned"
KEY = ("kernel", "dtype", "width", "mask", "size")
FIELDS = (
    *KEY, "config", "status", "median_us", "default_us", "failed", "op", "case", "device", "jax", "date", "digest",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """The key of an entry: a kernel and a class of problems."""

    kernel: str  # the full name: "flash_attention_forward.triton"
    dtype: str
    width: int
    mask: str  # the kind of mask: "none", "causal", "unified", ...; other kernels put other properties here
    size: int  # the power of two nearest to the length

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} width={self.width} mask={self.mask} size={self.size}"


_TRYING: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("trying", default={})  # noqa: B039
_LISTENER: contextvars.ContextVar[dict[Key, Any] | None] = contextvars.ContextVar("listener", default=None)


def blocks[Blocks](kernel: str, default: Blocks, *, dtype, width: int, mask: str, size: int) -> Blocks:
    """The block sizes of one kernel for one problem; `default` if the kernel has not been tuned.

    Args:
      kernel: the full name, "<name of the GPU function>.<implementation>".
      default: a frozen dataclass; the result is an instance of the same class.
      mask: the kind of mask, "none" without a mask.
      size: the length that the choice depends on; sizes that round to one power of two share an entry.
    """
    key = Key(kernel, jnp.dtype(dtype).name, width, mask, bucket(size))
    if (listener := _LISTENER.get()) is not None:
        listener[key] = default
    if kernel in _TRYING.get():
        return _TRYING.get()[kernel]
    device = backend.target().kind
    usable = lambda key: _rebuilt(default, *known[key])
    known = {k: e for k, e in _known(device).items() if dataclasses.replace(k, size=key.size) == key}
    if key in known and (found := usable(key)) is not None:
        return found
    for near in sorted(known, key=lambda k: (abs(math.log2(k.size / key.size)), k.size)):
        if near != key and (found := usable(near)) is not None:
            _log_once(f"{key}: not tuned on {device}; using the blocks of size={near.size}.")
            return found
    return default


def bucket(size: int) -> int:
    """The power of two nearest to a length on a logarithmic scale."""
    return 2 ** round(math.log2(max(size, 1)))


@contextlib.contextmanager
def trying(kernel: str, config: Any) -> Iterator[None]:
    """Makes `blocks` return `config` for this kernel in code that is traced inside the context."""
    token = _TRYING.set({**_TRYING.get(), kernel: config})
    try:
        yield
    finally:
        _TRYING.reset(token)


@contextlib.contextmanager
def listening() -> Iterator[dict[Key, Any]]:
    """Records every call of `blocks` inside the context: a dict from the key to the default of the call."""
    asked: dict[Key, Any] = {}
    token = _LISTENER.set(asked)
    try:
        yield asked
    finally:
        _LISTENER.reset(token)


def tried() -> tuple[tuple[str, Any], ...]:
    """The configs that `trying` has set here, by kernel."""
    return tuple(sorted(_TRYING.get().items()))


def listens() -> bool:
    """Whether `listening` is active here."""
    return _LISTENER.get() is not None


def shipped_path(device: str) -> Path:
    """tuned/nvidia_h200.json for "NVIDIA H200"."""
    return SHIPPED / f"{device.lower().replace(' ', '_')}.json"


def user_path(device: str) -> Path:
    """The file that DITO_TUNED names, which may hold several devices, else the device's own file in ~/.cache."""
    if named := _named_file():
        return named
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "dito_jax", "tuned", shipped_path(device).name)


def _named_file() -> Path | None:
    named = os.environ.get("DITO_TUNED")
    return Path(named) if named else None


def load(path: Path) -> dict[Key, dict[str, Any]]:
    """All entries of a file; empty if there is no file.

    Raises:
      ValueError: it is not a file of tuned block sizes; the message has the path, the problem and the remedy.
    """
    if not path.exists():
        return {}
    cure = "delete it, or write a new one with python -m kernels_pallas.tune"
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            if wrong := sorted(set(entry) ^ set(FIELDS)):
                raise ValueError(f"an entry has missing or unknown fields: {', '.join(wrong)}")
            if (
                any(type(entry[name]) is not wanted for name, wanted in Key.__annotations__.items())
                or entry["size"] < 1
            ):
                raise ValueError(f"an entry has an invalid key: {', '.join(str(entry[name]) for name in KEY)}")
        return {Key(**{name: entry[name] for name in KEY}): entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"it has no list of entries ({error!r})" if isinstance(error, KeyError | TypeError) else str(error)
        raise ValueError(f"{path}: not a file of tuned block sizes: {what.partition('\n')[0]}; {cure}.") from None


def save(path: Path, entries: list[dict[str, Any]]) -> None:
    """Writes entries to a file atomically; they replace the file's entries of the same keys.

    Raises:
      ValueError: the existing file is not a file of tuned block sizes.
    """
    merged = load(path) | {Key(**{name: entry[name] for name in KEY}): entry for entry in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"entries": [merged[key] for key in sorted(merged)]}, indent=1) + "\n")
    os.replace(temporary, path)
    _read.cache_clear()


def _known(device: str) -> dict[Key, tuple[Path, dict[str, Any]]]:
    """The entries of a device, each with its file: the user's entries take precedence over the committed ones."""
    if (named := _named_file()) is not None and not named.exists():
        _log_once(f"DITO_TUNED names {named}, which does not exist. It is ignored.")
    return {
        key: (path, entry)
        for path in (shipped_path(device), user_path(device))
        for key, entry in _read(path).items()
        if entry["device"] == device and entry["status"] == "ok"
    }


@functools.cache
def _read(path: Path) -> dict[Key, dict[str, Any]]:
    try:
        return load(path)
    except ValueError as error:
        _log_once(f"{error} It is ignored.")
        return {}


def _rebuilt[Blocks](default: Blocks, path: Path, entry: dict[str, Any]) -> Blocks | None:
    """The entry's config as an instance of the default's class; None, logged in one line, if its fields do not fit."""
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}  # pyright: ignore
    config = entry["config"]
    if not isinstance(config, dict) or any(type(v) is not type(fields.get(name)) for name, v in config.items()):
        wanted = ", ".join(f"{name}: {type(value).__name__}" for name, value in fields.items())
        _log_once(f"{path}: {entry['kernel']}: wanted a config of {wanted}, got {config}. It is ignored; tune again.")
        return None
    return dataclasses.replace(default, **config)  # pyright: ignore


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
