"""The privacy budget of a data set: what the entries of its ledger have spent and planned, and what is left.

Guarantees
  - `steps_left` is computed from all charged steps of all runs, and never allows a step that exceeds the budget.
  - The steps that a run has planned at its last start and not yet taken are no part of what is spent. They are counted
    only for `shortage`, which tells a new run that the budget does not suffice for all of them.
"""

import dataclasses

from dito_jax.privacy.accounting import Release, epsilon, merged, remaining_steps


AHEAD = 64  # steps of each other release that a cached number of remaining steps allows for


@dataclasses.dataclass(frozen=True)
class Budget:
    """The privacy budget of a data set."""

    epsilon: float
    delta: float
    unit: str  # "example" or "user"


@dataclasses.dataclass
class Room:
    """Cache: `left` more steps of one release fit, even after the given numbers of steps of `others`."""

    left: int
    others: dict[Release, int]


@dataclasses.dataclass
class Plan:
    """The last start of a run: `left` of its planned steps are not charged."""

    restart: int
    release: Release
    left: int


class Spending:
    """The sums of the entries of a ledger."""

    def __init__(self):
        self.total: dict[Release, int] = {}
        self.by_run: dict[str, dict[Release, int]] = {}
        self.plans: dict[str, Plan] = {}
        self._room: dict[Release, Room] = {}

    def new_budget(self) -> None:
        """Call it when the budget has changed."""
        self._room.clear()

    def start(self, run: str, plan: Plan) -> None:
        """Adds a start of a run; its plan replaces the one of the run's earlier start."""
        self.plans[run] = plan

    def charge(self, run: str, restart: int, release: Release) -> None:
        """Adds one charged step."""
        for of_release, room in self._room.items():
            if of_release == release:
                room.left -= 1
            else:
                room.others[release] = room.others.get(release, 0) - 1
        self.total = merged(self.total, {release: 1})
        self.by_run[run] = merged(self.by_run.get(run, {}), {release: 1})
        if (plan := self.plans.get(run)) is not None and plan.restart == restart:
            plan.left = max(plan.left - 1, 0)

    def steps_left(self, release: Release, budget: Budget) -> int:
        """Number of further steps that fit; cached, because the computation is slow."""
        room = self._room.get(release)
        if room is None or min(room.left, *room.others.values(), 0) < 0:
            room = self._computed_room(release, AHEAD, budget)
        if room.left < 1:
            room = self._computed_room(release, 0, budget)
        self._room[release] = room
        return room.left

    def _computed_room(self, release: Release, ahead: int, budget: Budget) -> Room:
        others = {other: ahead for other in self.total if other != release}
        return Room(remaining_steps(merged(self.total, others), release, budget.epsilon, budget.delta), others)

    def excess(self, release: Release, steps: int, budget: Budget) -> str | None:
        """Why `steps` further steps do not fit into the budget, and what they would need; None if they fit."""
        left = self.steps_left(release, budget)
        if steps <= left:
            return None
        needed = epsilon(merged(self.total, {release: steps}), budget.delta)
        return (
            f"{steps} steps at noise {release.noise_multiplier:g} would exceed epsilon {budget.epsilon:g} at delta "
            f"{budget.delta:g}: {left} remain, because epsilon {epsilon(self.total, budget.delta):.4g} is spent; all "
            f"{steps} steps need a budget of epsilon {rounded_up(needed)}"
        )

    def shortage(self, run: str, release: Release, steps: int, budget: Budget) -> str | None:
        """The same for steps that fit now, but not together with those that other runs have planned and not taken."""
        others = {name: plan for name, plan in self.plans.items() if name != run and plan.left}
        planned = merged(*({plan.release: plan.left} for plan in others.values()))
        whole = merged(self.total, planned, {release: steps})
        if not others or (needed := epsilon(whole, budget.delta)) <= budget.epsilon:
            return None
        left = remaining_steps(merged(self.total, planned), release, budget.epsilon, budget.delta)
        names = ", ".join(f"run {name[:8]}: {plan.left} steps" for name, plan in others.items())
        return (
            f"{steps} steps fit into what is left of epsilon {budget.epsilon:g} at delta {budget.delta:g}, but not "
            f"together with the steps that other runs have planned and not taken ({names}): {left} remain if those "
            f"are taken, and all together need a budget of epsilon {rounded_up(needed)}"
        )


def rounded_up(value: float) -> str:
    """Four digits that are not below the value, so that a budget of this epsilon suffices."""
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * 1.0005:.4g}"
