"""The optimizer: AdamW with gradient clipping, linear warm-up and cosine decay."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping. The defaults are LightningDiT's and JiT's, except for the cosine decay."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Number of steps of linear learning-rate warm-up."""
    final_fraction: float = 0.0
    """Final learning rate as a fraction of the peak; 1.0 keeps it constant after the warm-up."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    weight_decay: float = 0.0
    """Weight decay of the kernel matrices; biases, norms and embeddings have none."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradient (gradient clipping)."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule: linear warm-up from 0 to the peak, then cosine decay that reaches its end value at update `steps`.

    Updates count from 0, so the first update of a warm-up has learning rate 0.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` steps."""
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
    """The weight decay mask: True for kernels; False for biases, norms and embedding tables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(getattr(key, "key", "")).endswith("kernel") for key in path), params
    )
