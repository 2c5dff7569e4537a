"""Secret random keys of a private run: a 256-bit secret, and the keys that each step derives from it.

Guarantees
  - A secret is 32 bytes from the operating system's entropy source, in a file that only its owner may read (mode 600
    from its creation), outside the run directory. A file that belongs to another user, or that others may read, is
    refused. With the secret the noise can be subtracted: never release or log it, and delete it after the run. It
    appears in no repr, and it is not sent to other processes: each reads the file (agreement.py).
  - Every step of every start of every run has its own key for each purpose: HMAC-SHA256 with all bits of the secret. A
    step that is repeated after a crash has another key, so its noise is new and it counts as another release; the same
    noise with other gradients would reveal their difference.
  - The noise uses all 256 bits of its key. The random numbers of the loss (timesteps and their noise) use a 64-bit
    threefry key, because they need not be secret.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt32

from dito_jax.distributed import index
from dito_jax.errors import UserError
from dito_jax.telemetry.run_directory import explained


Purpose = Literal["noise", "batch", "draw"]
SECRET_BYTES = 32


class StepKeys:
    """The keys of one start of a run."""

    def __init__(self, secret: bytes, run: str, restart: int):
        assert len(secret) == SECRET_BYTES, "a secret is 32 bytes"
        self._secret, self.run, self.restart = secret, run, restart

    def __repr__(self) -> str:
        return f"StepKeys(run={self.run!r}, restart={self.restart})"

    def key(self, step: int, purpose: Purpose) -> UInt32[np.ndarray, " 8"]:
        """256 bits; the first two words are a key for `jax.random.wrap_key_data`."""
        return np.frombuffer(self._bytes(step, purpose), np.uint32).copy()

    def generator(self, step: int, purpose: Purpose) -> np.random.Generator:
        """A NumPy generator seeded with all 256 bits of the key; its state has 128 bits."""
        return np.random.default_rng(int.from_bytes(self._bytes(step, purpose)))

    def _bytes(self, step: int, purpose: Purpose) -> bytes:
        # Each field is preceded by its length, so that different fields never give the same message.
        fields = [purpose.encode(), self.run.encode(), str(self.restart).encode(), str(step).encode()]
        message = b"".join(len(field).to_bytes(4) + field for field in fields)
        return hmac.digest(self._secret, message, hashlib.sha256)


def secret_path(run: str) -> Path:
    """$DITO_SECRETS/<run>, or ~/.local/share/dito_jax/secrets/<run>.

    Raises:
      UserError: `run` is not a plain name, for example because a file of the run was edited.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", run):
        raise UserError(f"{run!r} names no secret of a run: wanted letters, digits and dashes; restore privacy.json.")
    return Path(os.environ.get("DITO_SECRETS") or Path.home() / ".local/share/dito_jax/secrets") / run


def run_secret(run: str) -> bytes:
    """The secret of a run; created at the first call.

    Raises:
      UserError: the file has the wrong size, other users may read it, it belongs to another user, or the disk is full.
    """
    path = secret_path(run)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create(path)
    return _read(path)


def shared_secret(run: str, *, seconds: float = 10.0) -> bytes:
    """The secret of a run that another process has created; waits for it, because a network file system may be late.

    Raises:
      UserError: this process does not see the file; also the errors of `run_secret`.
    """
    path = secret_path(run)
    until = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > until:
            raise UserError(
                f"{path}: process {index()}, on {socket.gethostname()}, does not see the secret that process 0 keeps "
                "in this file: set DITO_SECRETS to a folder that all processes of the run share and only you can read."
            )
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # a network file system then asks its server again
    return _read(path)


def _create(path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process created it first; that secret is then used
            os.link(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: wanted a file of yours that you can read; restore it.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file, wanted one with a secret; remove it, and start a new run.")
        if status.st_uid != os.geteuid():
            raise UserError(
                f"{path}: it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}: whoever "
                "wrote this secret knows it. Start a new run, or chown the file if it is yours."
            )
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(
                f"{path}: other users may read this secret: start a new run, or chmod 600 it if nobody has read it."
            )
        held = os.read(descriptor, SECRET_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(held) != SECRET_BYTES:
        size = status.st_size
        raise UserError(f"{path}: {size} bytes, wanted {SECRET_BYTES}; restore it, or start a new run.")
    return held
