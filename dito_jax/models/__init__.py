"""Models: DiT and MoE-DiT, each with its config, preset sizes and FLOPs; fine-tuning and upcycling."""

from dito_jax.models.dit import DiT as DiT, DiTConfig as DiTConfig
from dito_jax.models.moe_dit import MoEDiT as MoEDiT, MoEDiTConfig as MoEDiTConfig
