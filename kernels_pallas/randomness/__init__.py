"""Cryptographically secure Gaussian noise from the ChaCha20 stream cipher: `secure_normal`."""

from .api import SECURE_NORMAL as SECURE_NORMAL, secure_normal as secure_normal
