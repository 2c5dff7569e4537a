"""Diffusion as plain functions of arrays: path, prediction types, flow matching loss, guidance, samplers."""
