"""Checkpoints: asynchronous saves, checksums, and verification on restore."""
