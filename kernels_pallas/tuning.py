"""Which block sizes a kernel takes: those that were measured to be fastest, else its family's default.

A kernel asks `blocks` when it is traced. The first of these that there is decides:
  1. what `trying` holds: a search, or a test, at work;
  2. the user's own file: the one that DITO_TUNED names, else ~/.cache/dito_jax/tuned/<device>.json;
  3. the shipped tuned/<device>.json;
  4. in both, the entry of the nearest size, which the log says once;
  5. the default.

`python -m kernels_pallas.tune` searches and writes such files. A file that cannot be read, or that says what this
version does not know, is one line in the log and is not used: training goes on with what is left. A change to a file
counts from the next process on.
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
    """What an entry is for."""

    kernel: str  # in full: "flash_attention_forward.triton"
    dtype: str
    width: int
    mask: str  # its class: "none", "causal", "unified", ...
    size: int  # the power of two nearest to the length

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} width={self.width} mask={self.mask} size={self.size}"


_TRYING: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("trying", default={})  # noqa: B039
_LISTENER: contextvars.ContextVar[dict[Key, Any] | None] = contextvars.ContextVar("listener", default=None)


def blocks[Blocks](kernel: str, default: Blocks, *, dtype, width: int, mask: str, size: int) -> Blocks:
    """The block sizes of one kernel for one problem; `default` where nothing better is known.

    Args:
      kernel: its full name, "<name of the GPU function>.<road>".
      default: a frozen dataclass; what is returned is one of the same class.
      mask: the mask's class, "none" without one.
      size: the length that decides; sizes of one power of two share an entry.
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
    """The power of two nearest to a length, by ratio."""
    return 2 ** round(math.log2(max(size, 1)))


@contextlib.contextmanager
def trying(kernel: str, config: Any) -> Iterator[None]:
    """Gives `kernel` these blocks, whatever is known. It counts for what is traced inside."""
    token = _TRYING.set({**_TRYING.get(), kernel: config})
    try:
        yield
    finally:
        _TRYING.reset(token)


@contextlib.contextmanager
def listening() -> Iterator[dict[Key, Any]]:
    """A dict that takes each key that `blocks` is asked for inside, and the default it was asked with."""
    asked: dict[Key, Any] = {}
    token = _LISTENER.set(asked)
    try:
        yield asked
    finally:
        _LISTENER.reset(token)


def shipped_path(device: str) -> Path:
    """tuned/nvidia_h200.json for "NVIDIA H200"."""
    return SHIPPED / f"{device.lower().replace(' ', '_')}.json"


def user_path(device: str) -> Path:
    """The file that DITO_TUNED names, whose entries may be of several devices, else one a device in ~/.cache."""
    if named := _named_file():
        return named
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "dito_jax", "tuned", shipped_path(device).name)


def _named_file() -> Path | None:
    named = os.environ.get("DITO_TUNED")
    return Path(named) if named else None


def load(path: Path) -> dict[Key, dict[str, Any]]:
    """Every entry of a file; none where there is no file.

    Raises:
      ValueError: it is no such file; the message says where, what, and what to do.
    """
    if not path.exists():
        return {}
    cure = "delete it, or write it anew with python -m kernels_pallas.tune"
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            if wrong := sorted(set(entry) ^ set(FIELDS)):
                raise ValueError(f"an entry has not exactly the fields of this version: {', '.join(wrong)}")
            if (
                any(type(entry[name]) is not wanted for name, wanted in Key.__annotations__.items())
                or entry["size"] < 1
            ):
                raise ValueError(f"an entry's key is none: {', '.join(str(entry[name]) for name in KEY)}")
        return {Key(**{name: entry[name] for name in KEY}): entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no list of entries ({error!r})" if isinstance(error, KeyError | TypeError) else str(error)
        raise ValueError(f"{path}: not a file of tuned blocks: {what.partition('\n')[0]}; {cure}.") from None


def save(path: Path, entries: list[dict[str, Any]]) -> None:
    """Puts entries in a file, in place of those with their keys, all at once.

    Raises:
      ValueError: what is there is no file of tuned blocks.
    """
    merged = load(path) | {Key(**{name: entry[name] for name in KEY}): entry for entry in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"entries": [merged[key] for key in sorted(merged)]}, indent=1) + "\n")
    os.replace(temporary, path)
    _read.cache_clear()


def _known(device: str) -> dict[Key, tuple[Path, dict[str, Any]]]:
    """What both files say of a device, and which of them: the user's entries over the shipped ones."""
    if (named := _named_file()) is not None and not named.exists():
        _log_once(f"DITO_TUNED names {named}, which is not there. It is not used.")
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
        _log_once(f"{error} It is not used.")
        return {}


def _rebuilt[Blocks](default: Blocks, path: Path, entry: dict[str, Any]) -> Blocks | None:
    """The entry's config as an instance of the default's class; None, and a line in the log, where it is not one."""
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}  # pyright: ignore
    config = entry["config"]
    if not isinstance(config, dict) or any(type(v) is not type(fields.get(name)) for name, v in config.items()):
        wanted = ", ".join(f"{name}: {type(value).__name__}" for name, value in fields.items())
        _log_once(f"{path}: {entry['kernel']}: want a config of {wanted}, got {config}. It is not used; tune it again.")
        return None
    return dataclasses.replace(default, **config)  # pyright: ignore


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
