"""What a private run is asked to be, and what follows of it for every step."""

import dataclasses
from typing import Literal


Backend = Literal["vmap", "microbatch", "ghost", "bookkeeping"]  # of the clipped sum: clipping.py


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """A run with an epsilon is private; `train.batch_size` is then the expected number of units a step."""

    epsilon: float | None = None  # None: not private, and nothing below counts
    delta: float = 1e-5  # below one in the number of units
    dataset: str | None = None  # whose ledger is charged; a private run names one
    clip_norm: float = 1.0
    noise_multiplicity: int = 1  # of time and noise for each image and step, averaged before clipping
    backend: Backend = "bookkeeping"
    microbatch: int = 1  # units at a time on a device, of the backend "microbatch"
    max_batch: int | None = None  # units that a step has room for; None: so many that none is turned away
    images_per_user: int | None = None  # the unit is a user, with so many images a step at most; None: an image
    spare_steps: int = 0  # steps that may be done again after a crash, and are paid for beforehand
    internal: bool = False  # also write losses and norms of the examples themselves, which are not to be released


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one private step does."""

    noise_multiplier: float  # sigma: noise per number, in units of clip_norm
    sampling_prob: float  # q
    num_units: int  # n
    max_batch: int  # units that a step has room for

    @property
    def expected_batch(self) -> float:
        """q n."""
        return self.sampling_prob * self.num_units

    def rows(self, multiple: int) -> int:
        """The rows of a batch, of which there may be more than units, to divide into so many."""
        return -(-self.max_batch // multiple) * multiple
