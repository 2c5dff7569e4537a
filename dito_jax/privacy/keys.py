"""Secret random keys of a private run: a 256-bit secret, and the keys that each step derives from it.

Guarantees
  - A secret is 32 bytes from the operating system's entropy source, in a file that only its owner may read, outside the
    run directory. With the secret the noise can be subtracted: never release or log it, and delete it after the run.
    It appears in no repr.
  - Every step of every start of every run has its own key for each purpose: HMAC-SHA256 with all bits of the secret. A
    step that is repeated after a crash has another key, so its noise is new and it counts as another release; the same
    noise with other gradients would reveal their difference.
  - The noise uses all 256 bits of its key. The random numbers of the loss (timesteps and their noise) use a 64-bit
    threefry key, because they need not be secret.
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
        """A NumPy generator seeded with all 256 bits of the key; its state has 128 bits."""
        return np.random.default_rng(int.from_bytes(self._bytes(step, purpose)))

    def _bytes(self, step: int, purpose: Purpose) -> bytes:
        # Each field is preceded by its length, so that different fields never give the same message.
        fields = [purpose.encode(), self.run.encode(), str(self.restart).encode(), str(step).encode()]
        message = b"".join(len(field).to_bytes(4) + field for field in fields)
        return hmac.digest(self._secret, message, hashlib.sha256)


def secret_path(run: str) -> Path:
    """$DITO_SECRETS/<run>, or ~/.local/share/dito_jax/secrets/<run>."""
    return Path(os.environ.get("DITO_SECRETS") or Path.home() / ".local/share/dito_jax/secrets") / run


def run_secret(run: str) -> bytes:
    """The secret of a run; created at the first call.

    Raises:
      UserError: the file has the wrong size, or other users may read it.
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
            os.link(unfinished, path)  # fails if another process created it first; that secret is then used
        except FileExistsError:
            pass
        finally:
            unfinished.unlink()
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(
            f"{path}: other users may read this secret: start a new run, or chmod 600 it if nobody has read it."
        )
    held = path.read_bytes()
    if len(held) != SECRET_BYTES:
        raise UserError(f"{path}: {len(held)} bytes, wanted {SECRET_BYTES}; restore it, or start a new run.")
    return held
