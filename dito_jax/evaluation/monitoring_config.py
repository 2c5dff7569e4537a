"""Configuration of monitoring; in a file of its own, because a config imports neither matplotlib nor scikit-learn."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MonitoringConfig:
    """What is measured and drawn during training, and where metrics are sent."""

    validation_every: int = 0
    """Measure the loss on the validation split every this many steps; 0: never."""
    validation_examples: int = 500
    """Number of validation examples, each at its own fixed timestep and noise."""
    timestep_bins: int = 10
    """Number of equal bins of the timestep t in [0, 1] for which the validation loss is reported."""
    samples_every: int = 0
    """Draw a grid of samples into samples/ every this many steps; 0: never."""
    num_samples: int = 64
    """Number of samples in such a grid; they have the same noise and classes every time."""
    wandb_project: str | None = None
    """Weights & Biases project that metrics and sample grids are also logged to (pip install dito_jax[wandb])."""

    def problems(self, *, private: bool) -> dict[str, bool]:
        """Rules for these fields, {message: broken}."""
        positive = ("validation_examples", "timestep_bins", "num_samples")
        steps = ("validation_every", "samples_every")
        value = lambda name: getattr(self, name)
        return {
            **{f"monitoring.{name} is {value(name)}; it must be at least 1": value(name) < 1 for name in positive},
            **{f"monitoring.{name} is {value(name)}; wanted steps, or 0": value(name) < 0 for name in steps},
            "monitoring.wandb_project with privacy.epsilon: Weights & Biases records the time of each step, which is "
            "not to be released; set it to None": private and self.wandb_project is not None,
        }
