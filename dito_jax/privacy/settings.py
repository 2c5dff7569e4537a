"""Configuration of a private run, and the resulting parameters of a private step."""

import dataclasses
from typing import Literal


Backend = Literal["vmap", "microbatch", "ghost", "bookkeeping"]  # implementations of per-example clipping: clipping.py


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy (DP-SGD). With an epsilon, `train.batch_size` is the expected number of units in a step."""

    epsilon: float | None = None
    """Target epsilon of the run; None: training is not private and the other privacy fields are ignored."""
    delta: float = 1e-5
    """Target delta; it must be below 1 / (number of units)."""
    dataset: str | None = None
    """Name of the data set whose privacy ledger is charged; a private run must give one."""
    clip_norm: float = 1.0
    """L2 norm that each unit's gradient is clipped to."""
    noise_multiplicity: int = 1
    """Draws of timestep and noise per image and step, averaged before clipping (noise multiplicity)."""
    backend: Backend = "bookkeeping"
    """Implementation of per-example gradient clipping."""
    microbatch: int = 1
    """Units computed at a time on each device by the microbatch backend."""
    max_batch: int | None = None
    """Maximum number of units in a step (fixed batch shape); None: so many that truncation is negligible and
    accounted for."""
    images_per_user: int | None = None
    """Maximum images per user and step, with users as the privacy unit; None: each image is a unit."""
    spare_steps: int = 0
    """Additional steps in the privacy budget, for steps that are repeated after a crash."""
    internal: bool = False
    """Also log losses and gradient norms of the private examples; these must not be released."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Parameters of a private step."""

    noise_multiplier: float  # sigma: standard deviation of the noise in units of clip_norm
    sampling_prob: float  # q: probability of each unit in a step (Poisson subsampling)
    num_units: int  # n: number of units in the data set
    max_batch: int  # maximum number of units in a step

    @property
    def expected_batch(self) -> float:
        """Expected number of units in a step, q n."""
        return self.sampling_prob * self.num_units

    def rows(self, multiple: int) -> int:
        """Number of rows of a batch: max_batch rounded up to a multiple of `multiple`."""
        return -(-self.max_batch // multiple) * multiple
