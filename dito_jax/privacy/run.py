"""A private run for train.py: the plan (noise, batch size) and Poisson-subsampled batches, each charged to the ledger.

Guarantees
  - `batches_after` yields a batch only after its charge is on disk in the ledger of the data set. If the charge would
    exceed the budget, the run ends with a one-line error.
  - The plan is made once and stored in the run directory: a resumed run continues with the same plan, or fails and
    names the changed settings. A run directory is private from its first step, or never.
  - The run fails if the ledger lacks an entry that this run has recorded, or a step that it has taken, if its entries
    differ from the plan, and if another ledger already has runs on the same data under another name.
  - A run that fits the budget, but not together with what other runs have planned and not taken, is told so.
  - Repeated steps, also within one process, have new keys and are charged again.
  - Of several processes, process 0 writes the ledger and creates the secret. The others read the secret from its file;
    it is not sent over the network (agreement.py).
"""

import concurrent.futures
import dataclasses
import json
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from dito_jax.data import Source
from dito_jax.distributed import agree
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, noise_multiplier, truncation
from dito_jax.privacy.agreement import agreed
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.keys import StepKeys
from dito_jax.privacy.ledger import Ledger, charged_elsewhere, ledger_path
from dito_jax.privacy.ledger_head import check_ledger, write_head
from dito_jax.privacy.sampling import PoissonBatches, Units
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import LoopConfig


PLAN = "privacy.json"


class PrivateRun:
    """A private run on the units of one source."""

    def __init__(
        self,
        privacy: PrivacyConfig,
        loop: LoopConfig,
        source: Source,
        run: RunDirectory,
        *,
        multiple: int,
        data: str | None = None,
        starts_from: Sequence[str] = (),
    ):
        """`multiple` divides the number of rows of a batch. `data` is a description of the source, such as its path.
        `starts_from` are the names of the private runs on this data set that the initial parameters come from.

        Raises:
          UserError: the settings are invalid, or differ from those of the start of the run.
        """
        self._privacy, self._loop, self._source, self._run = privacy, loop, source, run
        self.units = units_of(source, privacy)
        wanted = _settings(privacy, loop, len(self.units))
        kept = json.loads((run.path / PLAN).read_text()) if (run.path / PLAN).exists() else None
        if kept is None:
            kept = {"run": uuid.uuid4().hex, "settings": wanted, "plan": None}
        if changed := [name for name in wanted if kept["settings"].get(name) != wanted[name]]:
            raise UserError(
                f"{run.path}: {', '.join(changed)} changed since this private run was started, but its noise was "
                "calibrated for the old values: restore them, or start another run (--run-dir)."
            )
        self.plan = StepPlan(**kept["plan"]) if kept["plan"] else make_plan(privacy, loop, len(self.units), multiple)
        self.name: str = kept["run"]
        behind = list(dict.fromkeys([*kept.get("starts_from", []), *starts_from]))
        self._kept: dict[str, Any] = kept | {"plan": dataclasses.asdict(self.plan), "starts_from": behind}
        self._rows, self._data, self._starts = self.plan.rows(multiple), data, 0
        self._ledger: Ledger | None = None

    @property
    def release(self) -> Release:
        """The release of a step of this run, for the accountant."""
        return release_of(self.plan)

    def batches_after(self, step: int, share: int, shares: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of the batches of step + 1, step + 2, ...; each is charged before it is yielded.

        Raises:
          UserError: the planned steps exceed the budget; the iterator raises it if the next step does.
        """
        keys = self._begin(step)
        images = self._privacy.images_per_user or 1
        batches = PoissonBatches(
            self._source, self.units, self.plan, keys,
            rows=self._rows, images_per_unit=images, share=share, shares=shares,
        )  # fmt: skip
        return self._charged(batches, step, keys.restart)

    def _charged(self, batches: PoissonBatches, step: int, restart: int) -> Iterator[dict[str, np.ndarray]]:
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="next-private-batch") as ahead:
            batch = ahead.submit(batches.batch, step + 1)
            while True:
                step += 1
                self._charge(restart, step)
                ready, batch = batch.result(), ahead.submit(batches.batch, step + 1)
                yield ready

    def _begin(self, step: int) -> StepKeys:
        """Records a start in the ledger; returns its keys, which are the same in all processes."""
        self._starts += 1
        start, secret = agreed(
            "private", str(self._starts), lambda: self._record_start(step), "the privacy ledger refused this run"
        )
        return StepKeys(secret, start["secret_of"], start["restart"])

    def _record_start(self, step: int) -> dict[str, Any]:
        privacy = self._privacy
        assert privacy.epsilon is not None and privacy.dataset is not None
        path = ledger_path(privacy.dataset)
        if self._data is not None and (other := charged_elsewhere(path, self._data)):
            raise UserError(
                f"privacy.dataset is {privacy.dataset!r}, but runs on {self._data} were charged to {other}: a data set "
                "has one budget. Use that name, or keep the ledgers of an experiment elsewhere: DITO_LEDGERS."
            )
        self._ledger = ledger = Ledger(path)
        unit = "example" if privacy.images_per_user is None else "user"
        if ledger.budget is None:
            ledger.set_budget(Budget(privacy.epsilon, privacy.delta, unit))
        budget = ledger.budget
        assert budget is not None
        if (budget.delta, budget.unit) != (privacy.delta, unit):
            raise UserError(
                f"{ledger.path}: its budget is for a delta of {budget.delta:g} and the unit {budget.unit!r}, the run "
                f"has {privacy.delta:g} and {unit!r}: set privacy.delta and privacy.images_per_user accordingly."
            )
        check_ledger(ledger, self._run, self._kept, self.release, steps=step)
        libraries = {name: version(name) for name in ("dp-accounting", "jax-privacy")}
        notes = {"versions": libraries, "after": step, "data": self._data}
        steps = self._loop.steps - step
        restart = ledger.start(self.name, self.release, steps, **notes)
        # After the start, so that of two runs that start at the same time one at least sees the plan of the other.
        shortage = ledger.shortage(self.name, self.release, steps) if self._starts == 1 else None
        self._kept["ledger"] = write_head(self._run, ledger)
        self._run.write_json(PLAN, self._kept)  # from here on the run is private
        if shortage is not None:
            Events(self._run).record("budget", shortage)
        return {"secret_of": self.name, "restart": restart}

    def _charge(self, restart: int, step: int) -> None:
        refused: UserError | None = None
        if self._ledger is not None:
            try:
                self._ledger.charge(self.name, restart, step, self.release)
                write_head(self._run, self._ledger)
            except UserError as error:
                refused = error
        if not agree(refused is None):
            raise refused or UserError(f"the privacy ledger refused step {step}; see the message of process 0.")


def trained(run: RunDirectory) -> bool:
    """Whether the run has a checkpoint, so that its initialization cannot change any more."""
    return run.checkpoints.exists() and any(path.name[:1].isdigit() for path in run.checkpoints.iterdir())


def check_history(run: RunDirectory, *, private: bool) -> None:
    """Raises UserError if a run directory has private steps and the next will not be private, or vice versa."""
    planned = (run.path / PLAN).exists()
    if private and trained(run) and not planned:
        raise UserError(
            f"{run.path}: its steps so far were not private, and this cannot be changed: start the private run in "
            "another directory (--run-dir)."
        )
    if planned and not private:
        raise UserError(
            f"{run.path}: a private run, whose guarantee a non-private step would break. Warm-start from it in another "
            f"directory: --init-from {run.path} --run-dir DIR."
        )


def units_of(source: Source, privacy: PrivacyConfig) -> Units:
    """The privacy units: examples, or users.

    Raises:
      UserError: images_per_user is set, but the source has no `owners`.
    """
    if privacy.images_per_user is None:
        return Units.examples(source)
    owners = getattr(source, "owners", None)
    if owners is None:
        raise UserError(
            f"privacy.images_per_user is {privacy.images_per_user}, but this data set has no owners of images: "
            "set it to None, or give owners (data.owner_pattern of image folders, owner_key of tar shards, "
            "owner_column of Parquet files, owners of latents)."
        )
    return Units.users(np.asarray(owners))


def make_plan(privacy: PrivacyConfig, loop: LoopConfig, num_units: int, multiple: int) -> StepPlan:
    """Calibrates the noise for the steps of the run and its spare steps, and chooses max_batch.

    Raises:
      UserError: a value is out of range.
    """
    assert privacy.epsilon is not None
    if privacy.delta * num_units >= 1:
        raise UserError(
            f"privacy.delta {privacy.delta:g} is not below 1/{num_units} (units): that would allow to publish a whole "
            f"unit; wanted {0.1 / num_units:.0e} or less."
        )
    steps = loop.steps + privacy.spare_steps
    room = max_batch(privacy, loop, num_units, multiple)
    truncated = room if room < num_units else None
    sigma = noise_multiplier(num_units, loop.batch_size, steps, privacy.epsilon, privacy.delta, max_batch=truncated)
    return StepPlan(sigma, loop.batch_size / num_units, num_units, room)


def max_batch(privacy: PrivacyConfig, loop: LoopConfig, num_units: int, multiple: int) -> int:
    """Rows of a private batch: privacy.max_batch, or so many that truncation is negligible; a multiple of `multiple`.

    Raises:
      UserError: the expected batch has more units than the data set.
    """
    if loop.batch_size > num_units:
        raise UserError(f"train.batch_size {loop.batch_size} is more than the number of units, {num_units}; lower it.")
    q, steps = loop.batch_size / num_units, loop.steps + privacy.spare_steps
    room = privacy.max_batch or truncation(num_units, q, steps=steps, delta=privacy.delta, multiple=multiple)
    return -(-room // multiple) * multiple


def release_of(plan: StepPlan) -> Release:
    """The release of a step of this plan, for the accountant."""
    if plan.max_batch >= plan.num_units:
        return Release(plan.sampling_prob, plan.noise_multiplier)
    return Release(plan.sampling_prob, plan.noise_multiplier, plan.num_units, plan.max_batch)


def _settings(privacy: PrivacyConfig, loop: LoopConfig, num_units: int) -> dict[str, Any]:
    """The settings that the noise was calibrated for."""
    chosen = ("epsilon", "delta", "dataset", "clip_norm", "max_batch", "images_per_user", "spare_steps")
    named = {f"privacy.{name}": getattr(privacy, name) for name in chosen}
    return named | {"train.batch_size": loop.batch_size, "train.steps": loop.steps, "number of units": num_units}
