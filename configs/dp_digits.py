"""Handwritten digits under differential privacy: begins with public pen strokes, sees the scans by DP-SGD.

python train.py configs/strokes.py --run-dir runs/strokes
python train.py configs/dp_digits.py --privacy.epsilon 10 --run-dir runs/dp_digits_10

Hardware: two CPU cores, five minutes a run, less than two with privacy.noise_multiplicity 1. Result: docs/dp_digits.md,
beside what simpler ways make of the same budget.
"""

from dito_jax.config import TrainConfig
from dito_jax.data import DigitsData
from dito_jax.evaluation.evaluate import EvaluationConfig
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DiTConfig(image_shape=(8, 8, 1), num_classes=10, patch=4, depth=2, width=64, num_heads=4),
        data=DigitsData(),
        init_from="runs/strokes",
        train=LoopConfig(
            steps=100,
            batch_size=256,
            trainable=("attention", "label", "modulation", "out", "patches"),
            compute_dtype="float32",
            ema_decays=(0.95,),
            log_every=10,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10),
        privacy=PrivacyConfig(epsilon=10.0, delta=1e-4, dataset="digits", clip_norm=0.2, noise_multiplicity=16),
        sample=SampleConfig(steps=25, guidance_scale=1.5, batch_size=250),
        evaluation=EvaluationConfig(num_samples=1440),
    )
