"""DiT-XL/2, original make, on ImageNet latents of 256-pixel images (32 x 32 x 4), with flow matching (SiT's recipe).

python train.py configs/dit_xl2_imagenet256.py --data.path /data/imagenet256_latents

Hardware: one H200 at this batch size; more with --mesh.fsdp. Not trained yet: `dito hlo configs/dit_xl2_imagenet256.py
--gpus 1xh200` compiles it without one.
"""

from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.config import TrainConfig
from dito_jax.data import LatentsData
from dito_jax.diffusion.loss import LossConfig
from dito_jax.evaluation.evaluate import EvaluationConfig
from dito_jax.models.dit import ORIGINAL, DiTConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DiTConfig.preset("XL/2", (32, 32, 4), 1000, **ORIGINAL, learn_sigma=True, remat=True),
        data=LatentsData(path="data/imagenet256_latents"),
        train=LoopConfig(steps=400_000, batch_size=256, compute_dtype="bfloat16", ema_decays=(0.9999,)),
        loss=LossConfig(prediction="v", loss_type="v", timestep_sampling="uniform"),
        optimizer=OptimizerConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=0, final_fraction=1.0),
        checkpoint=CheckpointConfig(every=10_000),
        evaluation=EvaluationConfig(num_samples=0),
    )
