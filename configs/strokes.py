"""Pen strokes in the shapes of digits, drawn by rules: public weights for configs/dp_digits.py to begin with.

python train.py configs/strokes.py

Hardware: two CPU cores, two minutes.
"""

from dito_jax.config import TrainConfig
from dito_jax.data import StrokesData
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DiTConfig(image_shape=(8, 8, 1), num_classes=10, patch=4, depth=2, width=64, num_heads=4),
        data=StrokesData(num=20_000),
        train=LoopConfig(steps=3000, batch_size=128, compute_dtype="float32", ema_decays=(0.995,)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        sample=SampleConfig(steps=25, guidance_scale=1.5, batch_size=250),
    )
