"""A private run end to end: train.py killed, resumed and refused; the `dito privacy` commands."""

import argparse
import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from dito_jax.cli import audit as cli_audit
from dito_jax.errors import UserError
from dito_jax.privacy.accounting import epsilon
from dito_jax.privacy.ledger import Ledger
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.run import saved_run
from dito_jax.telemetry.heartbeat import read_beat
from dito_jax.telemetry.run_directory import RunDirectory

from . import preloaded_python


STEPS, SPARE = 24, 20
PRIVATE = [
    "configs/digits.py", "--model.depth", "1", "--model.width", "32", "--train.batch_size", "64",
    "--train.steps", str(STEPS), "--train.log_every", "4", "--checkpoint.every", "5",
    "--evaluation.num_samples", "20", "--evaluation.grid", "10", "--sample.steps", "2",
    "--privacy.epsilon", "8", "--privacy.delta", "1e-4", "--privacy.dataset", "digits",
    "--privacy.spare_steps", str(SPARE), "--privacy.max_batch", "1600", "--canaries", "100",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and ledgers, secrets and compiled programs of these tests alone."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")}
    own = {f"DITO_{name}": str(home / name.lower()) for name in ("CACHE", "LEDGERS", "SECRETS")}
    return kept | own


@pytest.fixture(scope="module")
def call(environment):
    def run(*arguments, code=0, **added):
        done = preloaded_python.run(arguments, env=environment | added, timeout=400)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def entries(ledger: Path) -> list[dict]:
    """Whole lines alone: a process may be writing."""
    return [json.loads(line) for line in ledger.read_bytes().split(b"\n")[:-1]] if ledger.exists() else []


def charged(ledger: Path) -> list[tuple[int, int]]:
    """(start of the run, step) of every step that was paid for."""
    return [
        (entry["payload"]["restart"], entry["payload"]["step"]) for entry in entries(ledger) if entry["kind"] == "step"
    ]


def resumed_from(ledger: Path, start: int) -> int:
    """The step after which the run's start of that number went on."""
    return [entry["payload"]["after"] for entry in entries(ledger) if entry["kind"] == "start"][start]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, environment, call):
    """(run, ledger): killed twice between two steps, and then let go on to its end."""
    run = tmp_path_factory.mktemp("runs") / "private"
    ledger = Path(environment["DITO_LEDGERS"]) / "digits.jsonl"
    slow = ["--faults.inject", "slow-rank@1:0.1"]
    for start, until in enumerate((8, 14)):
        process = preloaded_python.Process(["train.py", *PRIVATE, *slow, "--run-dir", run], env=environment)
        deadline = time.monotonic() + 200
        while not any(pair[0] == start and pair[1] >= until for pair in charged(ledger)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        beat = read_beat(run / "heartbeats" / "0")
        assert beat is not None and beat.step > until - 1
        # Every update before the step that it was in when it died is on the disk as paid for.
        taken = range(resumed_from(ledger, start) + 1, beat.step)
        assert {(start, step) for step in taken} <= set(charged(ledger)) and len(taken) > 0
    call("train.py", *PRIVATE, "--run-dir", run)
    return run, ledger


def test_killed_and_resumed_the_ledger_has_every_step_of_every_start(killed):
    _, path = killed
    ledger = Ledger(path)
    (run,) = ledger.runs()
    assert ledger.restarts(run) == 3
    last = {step for start, step in charged(path) if start == 2}
    assert last == set(range(resumed_from(path, 2) + 1, STEPS + 1))
    total = sum(ledger.spent().values())
    assert STEPS < total == len(charged(path)) <= STEPS + SPARE  # what was done again was paid for again
    assert epsilon(ledger.spent(), 1e-4) <= 8


def test_metrics_tell_nothing_of_the_examples_and_figures_that_do_are_marked(killed):
    run, _ = killed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*rows)
    assert "gradient_norm" in names and not [name for name in names if "loss" in name or "internal" in name]
    assert "not to be released" in json.loads((run / "eval.json").read_text())["internal"]
    assert "not to be released" in (run / "report.md").read_text()


def test_a_second_run_is_refused_by_the_first_ones_budget(killed, call, tmp_path):
    before = killed[1].read_bytes()
    done = call("train.py", *PRIVATE, "--run-dir", tmp_path / "second", code=2)
    assert re.search(r"24 steps at noise .* would exceed epsilon 8 .* \d+ remain", done.stderr)
    assert "Traceback" not in done.stderr and killed[1].read_bytes() == before
    left = {path.name for path in (tmp_path / "second").iterdir()}
    assert not left & {"config.json", "privacy.json", "checkpoints"}  # so nobody takes it for a run


def test_its_directory_takes_no_steps_without_privacy(killed, call):
    before = (killed[0] / "config.json").read_bytes()
    public = PRIVATE[: PRIVATE.index("--privacy.epsilon")]
    done = call("train.py", *public, "--train.steps", "30", "--run-dir", killed[0], code=2)
    assert (
        "a private run, whose guarantee a non-private step would break" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (killed[0] / "config.json").read_bytes() == before


def test_the_card_is_what_the_ledger_says(killed, call):
    run, path = killed
    said = call("-m", "dito_jax", "privacy", "card", run).stdout
    card = json.loads((run / "privacy_card.json").read_text())
    ledger = Ledger(path)
    assert card["epsilon"] == epsilon(ledger.spent(), 1e-4) and card["steps_charged"] == len(charged(path))
    assert card["starts"] == 3 and card["unit"] == "example" and card["adjacency"] == "add-or-remove"
    assert card["audit"] is None and "Not audited." in said
    for words in ("number of units", "hyperparameter search", "float32", "dp-accounting", "not released"):
        assert words in said.lower()
    assert (run / "privacy_card.md").read_text().strip() == said.strip()


def test_the_ledger_and_the_plan_are_shown(killed, call):
    said = call("-m", "dito_jax", "privacy", "ledger", "digits").stdout
    assert "| 3 |" in said and " of 8 at delta 0.0001" in said and "chain intact" in said
    plan = call("-m", "dito_jax", "privacy", "plan", *PRIVATE, "--epsilon", "3").stdout
    assert "1492 images, with half of 100 canaries" in plan
    sigmas = {row.split("|")[1].strip(): float(row.split("|")[4]) for row in plan.splitlines()[4:] if "| 64 |" in row}
    assert sigmas["1"] > sigmas["3"] > sigmas["10"]
    call("-m", "dito_jax", "privacy", "ledger", "nobody", code=2)
    refused = call("-m", "dito_jax", "privacy", "card", killed[0].parent, code=2).stderr
    assert "no run here" in refused


def test_an_audit_is_shown_and_the_card_has_what_may_be_released(killed, call):
    run, _ = killed
    said = call("-m", "dito_jax", "privacy", "audit", run).stdout
    found = json.loads((run / "audit.json").read_text())
    assert (
        found["verdict"] == "not refuted" and found["step"] == STEPS and (run / "audit.md").read_text() in said + "\n"
    )
    canaries = found["canaries"]["num_in"] + found["canaries"]["num_out"]
    assert canaries == 100 and found["attacks"]["loss"]["members"] == 1442
    for picture in ("roc", "nearest"):
        assert (run / "audit" / f"{picture}.png").stat().st_size > 1000
    call("-m", "dito_jax", "privacy", "card", run)
    card = json.loads((run / "privacy_card.json").read_text())
    assert card["audit"]["canaries"] == found["canaries"] and card["canaries"] == 100
    assert card["epsilon"] == found["claimed_epsilon"] and "attacks" not in card["audit"]


def test_a_refuted_claim_is_an_error_once_it_is_written(killed, environment, monkeypatch):
    run, _ = killed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    leaky = lambda of_one: dataclasses.replace(of_one["noise off"], wanted="not refuted")
    sound = cli_audit.check_mechanism
    monkeypatch.setattr(cli_audit, "check_mechanism", lambda *a, **k: {"as it is": leaky(sound(*a, **k))})
    options = argparse.Namespace(subject=str(run), epsilon=None)
    with pytest.raises(UserError, match=r"the claim of epsilon \S+ is refuted; see audit.md there"):
        cli_audit.audit(options)
    assert "Verdict: **refuted**" in (run / "audit.md").read_text()
    open_run = dataclasses.replace(saved_run.opened(str(run))[1], privacy=PrivacyConfig())
    with pytest.raises(UserError, match="not a private run: say which epsilon to hold it to"):
        cli_audit._claim(RunDirectory(run), open_run, None)


def test_two_processes_keep_alike_and_go_back_with_other_keys(call, tmp_path):
    """Every third step their copies are compared; one gets a flipped bit, and both go back to a step before."""
    run, ledgers = tmp_path / "run", tmp_path / "ledgers"
    options = [
        "--processes", "2", "--train.steps", "8", "--checkpoint.every", "2", "--guard.check_replicas_every", "3",
        "--faults.inject", "bitflip-copy@5", "--run-dir", run,
    ]  # fmt: skip
    call("-m", "dito_jax", "supervise", *PRIVATE, *options, DITO_LEDGERS=str(ledgers))
    first, again = [(0, step) for step in range(1, 7)], [(1, step) for step in range(3, 9)]
    assert charged(ledgers / "digits.jsonl") == first + again
    assert "rolled back to step 2" in (run / "events.jsonl").read_text()
