"""Real handwritten digits (1,797 scans of 8x8 pixels that ship with scikit-learn), drawn by a small modern DiT.

python train.py configs/digits.py        (or `make train`, which installs first)

Hardware: two CPU cores, about two minutes of training. Result: docs/digits/, as this config wrote it.
"""

from dito_jax.config import TrainConfig
from dito_jax.data import DigitsData
from dito_jax.evaluation.monitoring_config import MonitoringConfig
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DiTConfig(image_shape=(8, 8, 1), num_classes=10, patch=2, depth=4, width=64, num_heads=4),
        data=DigitsData(),
        train=LoopConfig(
            steps=1500,
            batch_size=128,
            compute_dtype="float32",
            ema_decays=(0.995, 0.999),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        sample=SampleConfig(steps=25, guidance_scale=1.5, ema_decay=0.995, batch_size=250),
        monitoring=MonitoringConfig(validation_every=250, samples_every=500),
    )
