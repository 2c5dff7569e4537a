"""Chance that nobody can guess: normal numbers out of a stream cipher."""

from .api import SECURE_NORMAL as SECURE_NORMAL, secure_normal as secure_normal
