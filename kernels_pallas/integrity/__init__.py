"""Checksums of arrays, independent of their sharding: `state_digest`."""

from .api import STATE_DIGEST as STATE_DIGEST, state_digest as state_digest
