"""A trained run in memory, to sample from.

run = load_run("runs/digits")
images = run.sample(labels=[3, 7], guidance=2.0, seed=0)  # float32 (2, 8, 8, 1)
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Float

from dito_jax.config import TrainConfig
from dito_jax.data import LatentsData
from dito_jax.diffusion.path import Quantity
from dito_jax.errors import UserError
from dito_jax.evaluation.sample import SampleConfig, make_batch_sampler
from dito_jax.models.dit import DiT, DiTConfig
from dito_jax.run import saved_run
from dito_jax.telemetry.run_directory import RunDirectory


CLASSES = "classes.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A checkpoint of a run, on the first device of this machine."""

    path: Path
    config: TrainConfig
    step: int  # of the checkpoint
    classes: tuple[str, ...]  # the names of the classes in the order of their numbers
    graph: nnx.GraphDef
    params: nnx.State  # float32: an EMA of the parameters, or the parameters themselves

    def model(self) -> DiT:
        """The network, with these parameters."""
        return nnx.merge(self.graph, self.params)

    def sample(
        self,
        labels: Sequence[int | str],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: Literal["euler", "heun"] | None = None,
        seed: int = 0,
    ) -> Float[np.ndarray, "N h w c"]:
        """One image for each label, float32 (N, h, w, c).

        Args:
          labels: N class numbers or class names.
          guidance: scale of classifier-free guidance; 1 is none.
          steps: steps of the ODE solver `sampler`.
          seed: image i depends on the seed, its label and i alone.

        What is None is as in the config of the run.

        Returns:
          Images in [-1, 1]; of a model of latents, latents as the autoencoder's decoder takes them: divided by
          data.scaling_factor.

        Raises:
          UserError: the model has no such class, or a setting is out of range.
        """
        return np.concatenate(
            list(self.sample_batches(labels, guidance=guidance, steps=steps, sampler=sampler, seed=seed))
        )

    def sample_batches(
        self,
        labels: Sequence[int | str],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: Literal["euler", "heun"] | None = None,
        seed: int = 0,
    ) -> Iterator[Float[np.ndarray, "B h w c"]]:
        """The images of `sample` in batches of sample.batch_size, for more of them than fit into memory."""
        settings = sample_settings(self.config, guidance=guidance, steps=steps, sampler=sampler)
        draw = _sampler(self.graph, self.config.model, settings, self.config.loss.prediction)
        batches = draw(self.params, [self.label(name) for name in labels], seed)
        return map(self._of_data, batches)

    def _of_data(self, images: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B h w c"]:
        """Samples as the data are: latents without their scale, images clipped to [-1, 1]."""
        data = self.config.data
        return data.unscaled(images) if isinstance(data, LatentsData) else np.clip(images, -1, 1)

    def label(self, name: int | str) -> int:
        """The number of a class, given by its name or its number.

        Raises:
          UserError: there is no such class; the line says which name is near.
        """
        num_classes = self.config.model.num_classes
        if name in self.classes:
            return self.classes.index(str(name))
        if str(name).lstrip("-").isdecimal():
            if 0 <= int(name) < num_classes:
                return int(name)
            raise UserError(f"class {name}: this model has the classes 0 to {num_classes - 1}.")
        near = difflib.get_close_matches(str(name), self.classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {_listed(self.classes)}."
        raise UserError(f"no class {str(name)!r}; {hint}")


def load_run(path: str | Path, *, step: int | None = None, ema_decay: float | None = None, ema: bool = True) -> Run:
    """A run that train.py wrote, from its checkpoint of `step`, by default the latest good one.

    Args:
      ema_decay: which EMA of the parameters to take; by default the one that the config samples from.
      ema: False takes the parameters themselves.

    Raises:
      UserError: there is no run, no such checkpoint, or no EMA of that decay; or ema_decay is given with ema False.
    """
    directory, config = saved_run.opened(str(path))
    decays = config.train.ema_decays
    if ema_decay is not None and not ema:
        raise UserError(f"EMA decay {ema_decay:g} and no EMA: choose one of the two.")
    if ema_decay is not None and ema_decay not in decays:
        raise UserError(f"{path}: no EMA of decay {ema_decay:g}; choose from {', '.join(map(str, decays))}.")
    if ema_decay is not None:
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, ema_decay=ema_decay))
    program, state, found = saved_run.restored_here(directory, config, step)
    params = saved_run.sampled_ema(state, config) if ema else state.params
    return Run(directory.path, config, found, class_names_of(directory, config), program.graph, params)


def sample_settings(config: TrainConfig, *, guidance: float | None, steps: int | None, sampler: Any) -> SampleConfig:
    """The SampleConfig of a run, with what is not None changed.

    Raises:
      UserError: a setting is out of range, or guidance is asked of a model that was trained without class dropout.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps {steps}: wanted at least 1.")
    if guidance not in (None, 1) and config.loss.class_dropout_prob == 0:
        raise UserError(f"guidance {guidance:g}: the model was trained with loss.class_dropout_prob 0; only 1 works.")
    asked = {"guidance_scale": guidance, "steps": steps, "sampler": sampler}
    return dataclasses.replace(config.sample, **{name: value for name, value in asked.items() if value is not None})


def class_names_of(run: RunDirectory, config: TrainConfig) -> tuple[str, ...]:
    """The class names in classes.json; the numbers for a run of a version that wrote no names."""
    path = run.path / CLASSES
    names = json.loads(path.read_text()) if path.is_file() else []
    return tuple(names) or tuple(map(str, range(config.model.num_classes)))


@functools.lru_cache(maxsize=8)
def _sampler(graph: nnx.GraphDef, model: DiTConfig, settings: SampleConfig, prediction: Quantity) -> Callable:
    """Compiled once for each of the settings."""
    return make_batch_sampler(graph, model, settings, prediction)


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
