"""Diffusion as plain functions of arrays: the path, what is predicted, the loss, guidance, the samplers."""
