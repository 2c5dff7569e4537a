"""The handwritten digits of configs/digits.py, drawn by a DiT with eight experts in every block, two a token.

python train.py configs/moe_dit_digits.py

Hardware: two CPU cores, 4 min 40 s. Result: docs/moe_dit_digits/, as this config wrote it. Loads are
evened by the routers' biases (https://arxiv.org/abs/2408.15664), with little help from a loss.
"""

from dito_jax.config import TrainConfig
from dito_jax.data import DigitsData
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=MoEDiTConfig(
            image_shape=(8, 8, 1), num_classes=10, patch=2, depth=4, width=64, num_heads=4,
            num_experts=8, active_experts=2, expert_hidden=64, shared_hidden=64, router="sigmoid", bias_rate=0.003,
            balance_weight=0.001,
        ),
        data=DigitsData(),
        train=LoopConfig(
            steps=1500,
            batch_size=128,
            compute_dtype="float32",
            ema_decays=(0.995, 0.999),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        sample=SampleConfig(steps=25, guidance_scale=1.5, ema_decay=0.995, batch_size=250),
    )  # fmt: skip
