"""Models: one a file, each with its config, its size table and its flops."""

from dito_jax.models.dit import DiT as DiT, DiTConfig as DiTConfig
from dito_jax.models.moe_dit import MoEDiT as MoEDiT, MoEDiTConfig as MoEDiTConfig
