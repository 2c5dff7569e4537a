"""Chance that nobody can guess: a run's secret, and what every step derives from it.

Guarantees
  - A secret is 32 bytes of the operating system's entropy, in a file that its owner alone may read, apart from the run
    and its checkpoints. Whoever has it can subtract the noise: it is not to be released, logged, or kept for longer
    than the run. It appears in no repr.
  - Every step of every start of every run has keys of its own, for each purpose: HMAC-SHA256 of the secret, whose bits
    are all used. A step that is done again after a crash has another key, so its noise is drawn anew and it is a
    release of its own; the same noise under other gradients would give their difference away.
  - Noise has all 256 bits of its key. What is drawn for the loss (times, their noise) has a key of threefry, 64 bits:
    there chance need not be secret.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt32

from dito_jax.errors import UserError


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
        """NumPy's, seeded by all 256 bits, of which it keeps 128."""
        return np.random.default_rng(int.from_bytes(self._bytes(step, purpose)))

    def _bytes(self, step: int, purpose: Purpose) -> bytes:
        # Lengths first: no two lists of fields make one message.
        fields = [purpose.encode(), self.run.encode(), str(self.restart).encode(), str(step).encode()]
        message = b"".join(len(field).to_bytes(4) + field for field in fields)
        return hmac.digest(self._secret, message, hashlib.sha256)


def secret_path(run: str) -> Path:
    """$DITO_SECRETS/<run>, or ~/.local/share/dito_jax/secrets/<run>."""
    return Path(os.environ.get("DITO_SECRETS") or Path.home() / ".local/share/dito_jax/secrets") / run


def run_secret(run: str) -> bytes:
    """The secret of a run, made when it is first asked for.

    Raises:
      UserError: the file is not one, or others may read it.
    """
    path = secret_path(run)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)  # fails where another process was first, whose secret then counts
        except FileExistsError:
            pass
        finally:
            unfinished.unlink()
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path}: others may read this secret: start a new run, or if nobody did, chmod 600 it.")
    held = path.read_bytes()
    if len(held) != SECRET_BYTES:
        raise UserError(f"{path}: {len(held)} bytes, wanted {SECRET_BYTES}; restore it, or start a new run.")
    return held
