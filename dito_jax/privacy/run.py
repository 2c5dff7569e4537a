"""A private run as train.py has it: what its steps do, and its batches, each paid for before it is used.

Guarantees
  - No batch leaves `batches_after` before the ledger of its data set has its cost on disk; where that would exceed the
    budget, none leaves it again, and the run ends in one line.
  - The plan is made once, and kept with the run: a run that goes on does what it was started to do, or says what of
    its settings has changed. A directory is private from its first step, or never.
  - A ledger that lacks what this run saw in it, or a step that it took, is refused; so are data that another ledger
    has under another name.
  - Whenever steps may be taken again, in the same process too, they have other keys, and are charged again.
  - Of several processes, the first keeps the ledger and the secret, and tells the others; the secret passes through
    the store of the run's processes, on its network.
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
from dito_jax.distributed import agree, index, publish, published
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, noise_multiplier, truncation
from dito_jax.privacy.keys import StepKeys, run_secret
from dito_jax.privacy.ledger import Budget, Ledger, charged_elsewhere, ledger_path
from dito_jax.privacy.sampling import PoissonBatches, Units
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import LoopConfig


PLAN = "privacy.json"


class PrivateRun:
    """One run on the units of one source."""

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
        """`multiple`: what the rows of a batch divide into. `data`: what the source is, in words that are its own.
        `starts_from`: the names of the runs on this data set that the first state was learned by.

        Raises:
          UserError: the settings cannot go together, or are not those that the run was started with.
        """
        self._privacy, self._loop, self._source, self._run = privacy, loop, source, run
        self.units = units_of(source, privacy)
        wanted = _settings(privacy, loop, len(self.units))
        kept = json.loads((run.path / PLAN).read_text()) if (run.path / PLAN).exists() else None
        if kept is None:
            kept = {"run": uuid.uuid4().hex, "settings": wanted, "plan": None}
        if changed := [name for name in wanted if kept["settings"].get(name) != wanted[name]]:
            raise UserError(
                f"{run.path}: {', '.join(changed)} changed since this private run was started; its noise was chosen "
                "for the old values: restore them, or start another run (--run-dir)."
            )
        self.plan = StepPlan(**kept["plan"]) if kept["plan"] else make_plan(privacy, loop, len(self.units), multiple)
        self.name: str = kept["run"]
        behind = list(dict.fromkeys([*kept.get("starts_from", []), *starts_from]))
        self._kept: dict[str, Any] = kept | {"plan": dataclasses.asdict(self.plan), "starts_from": behind}
        self._rows, self._data, self._starts = self.plan.rows(multiple), data, 0
        self._ledger: Ledger | None = None

    @property
    def release(self) -> Release:
        """What a step of this run reveals."""
        return release_of(self.plan)

    def batches_after(self, step: int, share: int, shares: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of the batches of step + 1, step + 2, ...; each is charged before it is given.

        Raises:
          UserError: the budget does not have room for what is planned, or, from the iterator, for the next step.
        """
        start = self._begin(step)
        keys = StepKeys(bytes.fromhex(start["secret"]), start["run"], start["restart"])
        images = self._privacy.images_per_user or 1
        batches = PoissonBatches(
            self._source, self.units, self.plan, keys,
            rows=self._rows, images_per_unit=images, share=share, shares=shares,
        )  # fmt: skip
        return self._charged(batches, step, start["restart"])

    def _charged(self, batches: PoissonBatches, step: int, restart: int) -> Iterator[dict[str, np.ndarray]]:
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="next-private-batch") as ahead:
            batch = ahead.submit(batches.batch, step + 1)
            while True:
                step += 1
                self._charge(restart, step)
                ready, batch = batch.result(), ahead.submit(batches.batch, step + 1)
                yield ready

    def _begin(self, step: int) -> dict[str, Any]:
        """Enters a start into the ledger, and tells all processes which it is."""
        self._starts += 1
        refused: UserError | None = None
        if index() == 0:
            try:
                self._publish_start(step)
            except UserError as error:
                refused = error
        if not agree(refused is None):
            raise refused or UserError("the privacy ledger refused this run; process 0 says why.")
        return json.loads(published("private")[str(self._starts)])

    def _publish_start(self, step: int) -> None:
        privacy = self._privacy
        assert privacy.epsilon is not None and privacy.dataset is not None
        path = ledger_path(privacy.dataset)
        if self._data is not None and (other := charged_elsewhere(path, self._data)):
            raise UserError(
                f"privacy.dataset is {privacy.dataset!r}, and runs on {self._data} were charged to {other}: one data "
                "set has one budget. Name that, or keep an experiment's ledgers elsewhere: DITO_LEDGERS."
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
        self._check_ledger(ledger, step)
        libraries = {name: version(name) for name in ("dp-accounting", "jax-privacy")}
        notes = {"versions": libraries, "after": step, "data": self._data}
        restart = ledger.start(self.name, self.release, self._loop.steps - step, **notes)
        self._kept["ledger"] = {"number": ledger.number, "head": ledger.head}
        self._run.write_json(PLAN, self._kept)  # from here on the run is private
        start = {"run": self.name, "restart": restart, "secret": run_secret(self.name).hex()}
        publish(f"private/{self._starts}", json.dumps(start))

    def _check_ledger(self, ledger: Ledger, step: int) -> None:
        noted, charged = self._kept.get("ledger"), sum(ledger.spent(self.name).values())
        if noted is not None and not ledger.remembers(noted["number"], noted["head"]):
            raise UserError(
                f"{ledger.path}: entry {noted['number']} is not the one that this run saw: another file, or one cut "
                "short. Nothing can be said of what was spent: restore the ledger from a copy."
            )
        if lost := [name for name in self._kept.get("starts_from", []) if not ledger.restarts(name)]:
            raise UserError(
                f"{ledger.path}: run {lost[0][:8]}, which this one starts from, is not entered there, and it saw these "
                "data: use the ledger that has it (DITO_LEDGERS)."
            )
        if charged < step:
            raise UserError(
                f"{ledger.path}: {charged} steps of this run are entered, and it has taken {step}: entries are "
                "missing at the end. Restore the ledger from a copy."
            )

    def _charge(self, restart: int, step: int) -> None:
        refused: UserError | None = None
        if self._ledger is not None:
            try:
                self._ledger.charge(self.name, restart, step, self.release)
            except UserError as error:
                refused = error
        if not agree(refused is None):
            raise refused or UserError(f"the privacy ledger refused step {step}; process 0 says why.")


def trained(run: RunDirectory) -> bool:
    """Whether it holds a checkpoint, and so what it began with is settled."""
    return run.checkpoints.exists() and any(path.name[:1].isdigit() for path in run.checkpoints.iterdir())


def check_history(run: RunDirectory, *, private: bool) -> None:
    """Raises UserError if the steps that a run directory holds were taken with privacy and the next will not be, or the
    other way round."""
    planned = (run.path / PLAN).exists()
    if private and trained(run) and not planned:
        raise UserError(
            f"{run.path}: its steps so far were taken without privacy, which nothing gives them now: start the private "
            "run elsewhere (--run-dir)."
        )
    if planned and not private:
        raise UserError(
            f"{run.path}: a private run, and a step without privacy would break what was promised of it. Start from it "
            f"elsewhere: --init-from {run.path} --run-dir DIR."
        )


def units_of(source: Source, privacy: PrivacyConfig) -> Units:
    """Examples, or the users that own them.

    Raises:
      UserError: users are asked for, and the source does not say whose its examples are.
    """
    if privacy.images_per_user is None:
        return Units.examples(source)
    owners = getattr(source, "owners", None)
    if owners is None:
        raise UserError(
            f"privacy.images_per_user is {privacy.images_per_user}, but these data do not say whose their images are: "
            "leave it None, or give a source with `owners`."
        )
    return Units.users(np.asarray(owners))


def make_plan(privacy: PrivacyConfig, loop: LoopConfig, num_units: int, multiple: int) -> StepPlan:
    """The noise for the run's steps and its spare ones, and a batch with room for those that are drawn.

    Raises:
      UserError: values that cannot be.
    """
    assert privacy.epsilon is not None
    if privacy.delta * num_units >= 1:
        raise UserError(
            f"privacy.delta {privacy.delta:g} is not below 1/{num_units} units: that would allow to publish one of "
            f"them; wanted {0.1 / num_units:.0e} or less."
        )
    steps = loop.steps + privacy.spare_steps
    if loop.batch_size > num_units:
        raise UserError(f"train.batch_size {loop.batch_size} is more than the {num_units} units there are; lower it.")
    q = loop.batch_size / num_units
    room = privacy.max_batch or truncation(num_units, q, steps=steps, delta=privacy.delta, multiple=multiple)
    room = -(-room // multiple) * multiple
    truncated = room if room < num_units else None
    sigma = noise_multiplier(num_units, loop.batch_size, steps, privacy.epsilon, privacy.delta, max_batch=truncated)
    return StepPlan(sigma, q, num_units, room)


def release_of(plan: StepPlan) -> Release:
    """What a step of this plan reveals."""
    if plan.max_batch >= plan.num_units:
        return Release(plan.sampling_prob, plan.noise_multiplier)
    return Release(plan.sampling_prob, plan.noise_multiplier, plan.num_units, plan.max_batch)


def _settings(privacy: PrivacyConfig, loop: LoopConfig, num_units: int) -> dict[str, Any]:
    """All that the noise was chosen for."""
    chosen = ("epsilon", "delta", "dataset", "clip_norm", "max_batch", "images_per_user", "spare_steps")
    named = {f"privacy.{name}": getattr(privacy, name) for name in chosen}
    return named | {"train.batch_size": loop.batch_size, "train.steps": loop.steps, "number of units": num_units}
