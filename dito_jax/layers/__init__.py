"""Layers: small NNX modules and functions. They take numbers, never a config."""
