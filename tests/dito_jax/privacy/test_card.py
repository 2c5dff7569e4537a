"""The privacy card: epsilon of all steps that the parameters depend on, or an error."""

import itertools

import pytest

from dito_jax.data import DigitsData
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import epsilon
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.card import card, markdown
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.run import PrivateRun
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import LoopConfig


PRIVACY = PrivacyConfig(epsilon=3.0, delta=1e-4, dataset="digits", max_batch=2000)  # with room for all
SOURCE = DigitsData().open("train")


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """`begun(name)`: a private run of that name, and its directory."""
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "ledgers"))
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    Ledger(ledger_path("digits")).set_budget(Budget(10.0, 1e-4, "example"))

    def make(name, **more):
        path = RunDirectory(tmp_path / name)
        path.path.mkdir()
        loop = LoopConfig(steps=6, batch_size=64)
        return PrivateRun(PRIVACY, loop, SOURCE, path, multiple=8, **more), path

    return make


def take(run, steps):
    list(itertools.islice(run.batches_after(0, 0, 1), steps))


def of(path):
    return card(path, PRIVACY, init_from=None, trainable=(), canaries=0)


def test_runs_behind_it_on_the_same_data_count(begun):
    first, _ = begun("first")
    take(first, 6)
    second, path = begun("second", starts_from=[first.name])
    take(second, 4)
    facts = of(path)
    assert facts["epsilon"] == pytest.approx(epsilon({second.release: 10}, 1e-4))
    assert facts["epsilon_of_these_steps_alone"] == pytest.approx(epsilon({second.release: 4}, 1e-4))
    assert facts["steps_charged"] == 4 and facts["private_runs_behind_it"] == [first.name]
    assert markdown(facts).splitlines()[2].startswith(f"({facts['epsilon']:.4g}, 0.0001)-differentially private")


def test_nothing_is_promised_of_steps_that_were_not_charged(begun):
    run, path = begun("run")
    with pytest.raises(UserError, match=r"not a private run \(no privacy.json\)"):
        of(path)
    run.batches_after(0, 0, 1)
    with pytest.raises(UserError, match="0 of its steps are charged in .*digits.jsonl.*no privacy statement"):
        of(path)
    take(run, 4)
    (path.checkpoints / "4").mkdir(parents=True)
    assert of(path)["steps_charged"] == 4
    (path.checkpoints / "5.abandoned").mkdir()
    with pytest.raises(UserError, match="4 of its steps are charged in .*a checkpoint of step 5: no privacy statement"):
        of(path)
