"""AdamW with warm-up and cosine decay, behind a clip of the gradient's norm."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are LightningDiT's and JiT's, but for the decay of the learning rate."""

    learning_rate: float = 2e-4  # at its peak
    warmup_steps: int = 100
    final_fraction: float = 0.0  # of the peak, where the decay ends; 1.0 keeps it constant after the warm-up
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0  # of matrices only
    clip_norm: float = 1.0  # of the whole gradient


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over `warmup_steps`, then half a cosine that would end with the update after `steps`.

    Updates count from 0: the first of a warm-up has rate 0.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_matrices,
        ),
    )


def _matrices(params):
    """True for kernels; biases, norms and embedding tables do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(getattr(key, "key", "")).endswith("kernel") for key in path), params
    )
