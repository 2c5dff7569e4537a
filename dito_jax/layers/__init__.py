"""Layers: small NNX modules and functions, which take numbers and never a config."""
