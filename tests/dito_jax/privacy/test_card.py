"""The privacy card: epsilon of all steps that the parameters depend on, or an error."""

import itertools
import json

import pytest

from dito_jax.data import DigitsData
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import epsilon
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.card import card, markdown
from dito_jax.privacy.ledger import Ledger, _canonical, _hash, ledger_path
from dito_jax.privacy.ledger_head import HEAD
from dito_jax.privacy.run import PLAN, PrivateRun
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


def rewrite(kept=lambda entry: True, *, noise=None, run=None):
    """Rewrites the ledger with a new chain: fewer entries, other noise, or another run; who can write it can do so."""
    path, previous, lines = ledger_path("digits"), "0" * 64, []
    for entry in filter(kept, map(json.loads, path.read_bytes().splitlines())):
        del entry["hash"]
        if noise is not None and entry["kind"] == "step":
            entry["payload"]["release"]["noise_multiplier"] = noise
        if run is not None and entry["run"]:
            entry["run"] = run
        entry |= {"previous": previous, "number": len(lines) + 1}
        previous = _hash(entry)
        lines.append(_canonical(entry | {"hash": previous}) + b"\n")
    path.write_bytes(b"".join(lines))
    assert Ledger(path).number == len(lines)  # the chain alone shows nothing


def make_old(path):
    """As dito_jax 0.2 left a run: it noted the ledger at its start only."""
    (path.path / HEAD).unlink()
    plan = json.loads((path.path / PLAN).read_text())
    del plan["ledger"]["last_entry"]
    (path.path / PLAN).write_text(json.dumps(plan))


def test_a_ledger_that_was_rewritten_gives_no_figures(begun):
    """Epsilon 3 was told as 0.001 of a ledger in which the noise of all steps was 400."""
    run, path = begun("run")
    take(run, 6)
    (path.checkpoints / "4").mkdir(parents=True)
    whole = ledger_path("digits").read_bytes()
    told = of(path)["epsilon"]
    assert told == pytest.approx(epsilon({run.release: 6}, 1e-4))
    step_6 = lambda entry: entry["payload"].get("step") == 6
    for change in (
        lambda: rewrite(noise=400.0),
        lambda: rewrite(lambda entry: not step_6(entry)),  # truncated: 5 steps, and a checkpoint of step 4
        lambda: rewrite(lambda entry: entry["payload"].get("step") != 3),
    ):
        change()
        with pytest.raises(UserError, match=r"digits.jsonl: entry 8 differs from the one that this run recorded") as no:
            of(path)
        assert "restore the ledger from a copy" in str(no.value) and "\n" not in str(no.value)
        ledger_path("digits").write_bytes(whole)
    assert of(path)["epsilon"] == told


def test_a_ledger_that_was_exchanged_gives_no_figures(begun, tmp_path, monkeypatch):
    """That of another run with as many steps, under this one's name."""
    run, path = begun("run")
    take(run, 4)
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "other"))
    Ledger(ledger_path("digits")).set_budget(Budget(10.0, 1e-4, "example"))
    other, _ = begun("other run")
    take(other, 6)
    rewrite(run=run.name)
    with pytest.raises(UserError, match=r"other/digits.jsonl: entry \d differs from the one that this run recorded"):
        of(path)


def test_steps_of_other_runs_and_of_later_starts_do_not_disturb_a_card(begun):
    run, path = begun("run")
    take(run, 2)
    second, _ = begun("second")
    take(second, 3)
    facts = of(path)
    assert facts["steps_charged"] == 2 and facts["epsilon"] == pytest.approx(epsilon({run.release: 2}, 1e-4))
    list(itertools.islice(run.batches_after(2, 0, 1), 4))
    take(second, 1)
    assert of(path)["steps_charged"] == 6


def test_a_run_without_a_note_of_its_last_entry_is_held_to_its_plan(begun):
    """Old runs have none. Their entries must still be of the plan's noise, and as many as steps were taken."""
    run, path = begun("run")
    take(run, 6)
    (path.path / HEAD).write_text("")
    with pytest.raises(UserError, match="ledger_head.json: it should have the last ledger entry of this run"):
        of(path)
    make_old(path)
    assert of(path)["epsilon"] == pytest.approx(epsilon({run.release: 6}, 1e-4))
    rewrite(noise=400.0)
    with pytest.raises(UserError, match=r"this run with noise 400 and .*, but the plan of .*run has noise \d"):
        of(path)


def test_a_validation_loss_is_released_where_there_is_one(begun):
    run, path = begun("run")
    take(run, 2)
    samples = "samples/: drawn from these parameters"
    said = " ".join(of(path)["released"])
    assert samples in said and "validation_loss" not in said
    path.append(path.metrics, '{"step": 2, "validation_loss": 0.5}\n')
    said = " ".join(of(path)["released"])
    assert (
        samples in said and "validation_loss" in said and "validation split, which is not part of the private" in said
    )
