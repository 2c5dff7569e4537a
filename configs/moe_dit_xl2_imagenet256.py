"""DiT-MoE-XL/2-8E2A (https://arxiv.org/abs/2407.11633) on ImageNet latents of 256-pixel images, an expert on each GPU.

python train.py configs/moe_dit_xl2_imagenet256.py --data.path /data/imagenet256_latents

Hardware: eight H200s. Not trained yet: `dito hlo configs/moe_dit_xl2_imagenet256.py --gpus 8xh200` compiles it without
one.
"""

from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.config import TrainConfig
from dito_jax.data import LatentsData
from dito_jax.diffusion.loss import LossConfig
from dito_jax.evaluation.evaluate import EvaluationConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.sharding import MeshConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=MoEDiTConfig.preset("DiT-MoE-XL/2-8E2A", (32, 32, 4), 1000, learn_sigma=True, remat=True),
        data=LatentsData(path="data/imagenet256_latents"),
        train=LoopConfig(steps=400_000, batch_size=256, compute_dtype="bfloat16", ema_decays=(0.9999,)),
        loss=LossConfig(prediction="v", loss_type="v", timestep_sampling="uniform"),
        optimizer=OptimizerConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=0, final_fraction=1.0),
        mesh=MeshConfig(data=1, expert=8),
        checkpoint=CheckpointConfig(every=10_000),
        evaluation=EvaluationConfig(num_samples=0),
    )
