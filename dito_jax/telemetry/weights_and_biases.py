"""Weights & Biases: metrics and sample grids of a run, logged to a project beside TensorBoard.

The account and the mode come from the environment of the package wandb: WANDB_API_KEY, WANDB_MODE=offline. The files of
wandb are in RUN/wandb. A run that is resumed continues the same wandb run. Steps that are repeated after a rollback are
logged again; "step" is the x-axis of every chart.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dito_jax.errors import UserError
from dito_jax.telemetry.run_directory import RunDirectory


class WeightsAndBiases:
    """The wandb run of a run directory.

    Raises:
      UserError: the package wandb is not installed, or it cannot start a run.
    """

    def __init__(self, run: RunDirectory, project: str):
        try:
            wandb = importlib.import_module("wandb")  # an optional extra
        except ImportError as error:
            raise UserError(
                "monitoring.wandb_project needs the package wandb: pip install wandb, or set it to None."
            ) from error
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project, name=run.path.name, id=_id(run), resume="allow", dir=str(run.path),
                config=json.loads(run.config.read_text()) if run.config.is_file() else None,
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"monitoring.wandb_project {project!r}: {reason}; log in with `wandb login`, or set WANDB_MODE=offline."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one point for each value."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Logs one image under `name`."""
        self._run.log({"step": step, name: self._image(image)})

    def close(self) -> None:
        """Ends the wandb run and waits for its upload."""
        self._run.finish()


def _id(run: RunDirectory) -> str:
    """The id of the wandb run: from that in run.json, or the path for a directory without one."""
    identity: Any = None
    path = run.path / "run.json"
    if path.is_file():
        identity = json.loads(path.read_text()).get("id")
    return hashlib.sha256(str(identity or run.path.resolve()).encode()).hexdigest()[:16]
