"""Checkpoints: saved in the background, checksummed, and verified when they are restored."""
