"""Your own images, in folders named after their classes, drawn by a small modern DiT. No Python needed.

python train.py configs/images.py --data.path photos                       (or: dito train images --data.path photos)
dito train images --data.path photos --data.image_size 32
dito sample runs/images --class cat dog

photos/<class>/*.png (or jpg, webp, gif, bmp, tif, avif); one image in twenty is held out for evaluation, unless photos/
has train/ and validation/. Images are cropped to the centre and resized to data.image_size, 64 pixels unless you say
otherwise; the model takes their shape and the number of classes from the data. `--data.flip True` mirrors images at
random, which suits photos but not text. `dito data check photos` lists unreadable files.

Hardware: two CPU cores for a small model at 32 pixels; a GPU for more, e.g. --train.compute_dtype bfloat16
--model.depth 12 --model.width 384 --model.num_heads 6.
"""

from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.config import TrainConfig
from dito_jax.data import ImageFolderData
from dito_jax.evaluation.evaluate import EvaluationConfig
from dito_jax.evaluation.monitoring_config import MonitoringConfig
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DiTConfig(image_shape=(64, 64, 3), num_classes=1, patch=4, depth=6, width=128, num_heads=4),
        data=ImageFolderData(path="images", image_size=64),
        infer_from_data=True,
        train=LoopConfig(steps=5000, batch_size=64, compute_dtype="float32", ema_decays=(0.999,)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        checkpoint=CheckpointConfig(every=500, every_seconds=600),
        sample=SampleConfig(steps=25, guidance_scale=2.0, batch_size=64),
        evaluation=EvaluationConfig(num_samples=200, max_reference=1000, grid=64),
        monitoring=MonitoringConfig(validation_every=500, samples_every=500),
    )
