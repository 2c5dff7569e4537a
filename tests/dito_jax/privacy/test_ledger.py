"""The privacy ledger: no step without a charge, and no undetected change of an entry."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, epsilon, merged
from dito_jax.privacy.ledger import Budget, Ledger, ledger_path


ROOT = Path(__file__).parents[3]
RELEASE = Release(0.02, 4.0)

CHARGES = """
import signal
import sys
from pathlib import Path
from dito_jax.privacy.accounting import Release
from dito_jax.privacy.ledger import Ledger
signal.alarm(90)  # one that waits for ever, or that nobody stops, ends itself
ledger, done = Ledger(Path(sys.argv[1])), Path(sys.argv[2])
release = Release(0.02, 4.0)
restart = ledger.start(sys.argv[3], release, 1)
print("started", flush=True)
for step in range(10**9):
    ledger.charge(sys.argv[3], restart, step, release)
    with done.open("a") as file:  # the update that was paid for
        file.write(f"{restart} {step}\\n")
"""


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "digits.jsonl")
    made.set_budget(Budget(10.0, 1e-4, "example"))
    return made


def test_what_was_spent_survives_and_adds_up_over_runs(ledger):
    other = Release(0.1, 1.0)
    assert [ledger.start(run, RELEASE, 5) for run in ("a", "a", "b")] == [0, 1, 0]
    for step in range(3):
        ledger.charge("a", 1, step, RELEASE)
    ledger.charge("b", 0, 0, other)
    again = Ledger(ledger.path)
    assert again.spent() == {RELEASE: 3, other: 1} and again.spent("b") == {other: 1}
    assert again.restarts("a") == 2 and again.runs() == ["a", "b"] and again.head == ledger.head


def test_two_writers_see_each_others_steps(ledger):
    second = Ledger(ledger.path)
    for step in range(4):
        ledger.charge("a", 0, step, RELEASE)
        second.charge("b", 0, step, RELEASE)
    assert second.spent() == {RELEASE: 8} == Ledger(ledger.path).spent()


def test_a_run_that_does_not_fit_is_refused_with_what_remains_and_enters_nothing(ledger):
    ledger.set_budget(Budget(0.3, 1e-4, "example"))
    before = ledger.path.read_bytes()
    with pytest.raises(UserError, match=r"10000 steps .* would exceed epsilon 0.3 .*: (\d+) remain") as refusal:
        ledger.start("a", RELEASE, 10_000)
    assert ledger.path.read_bytes() == before
    left = int(str(refusal.value).split(" remain")[0].split()[-1])
    assert epsilon({RELEASE: left}, 1e-4) <= 0.3 < epsilon({RELEASE: left + 1}, 1e-4)
    ledger.start("a", RELEASE, left)
    for step in range(left):
        ledger.charge("a", 0, step, RELEASE)
    with pytest.raises(UserError, match=f"step {left} would exceed.*0 steps remain"):
        ledger.charge("a", 0, left, RELEASE)
    assert Ledger(ledger.path).spent() == {RELEASE: left}


def test_another_runs_steps_count_against_what_remains(ledger):
    ledger.set_budget(Budget(3.0, 1e-4, "example"))
    ledger.start("a", RELEASE, 1)
    ledger.charge("a", 0, 0, RELEASE)
    second = Ledger(ledger.path)
    with pytest.raises(UserError, match="would exceed"):
        for step in range(10_000):
            second.charge("b", 0, step, Release(0.5, 2.0))
    with pytest.raises(UserError, match="0 steps remain"):
        ledger.charge("a", 0, 1, Release(0.5, 2.0))


def test_two_runs_of_different_releases_spend_the_budget_together_and_no_more(ledger):
    """How many steps fit one run was reckoned before the other took its own, which use that up."""
    large = Release(0.3, 3.0)
    ledger.set_budget(Budget(3.0, 1e-4, "example"))
    other = Ledger(ledger.path)
    for run, writer, release in (("a", ledger, RELEASE), ("b", other, large), ("a", ledger, RELEASE)):
        writer.charge(run, 0, 0, release)
    for run, writer, release in (("b", other, large), ("a", ledger, RELEASE)):
        with pytest.raises(UserError, match="0 steps remain"):
            for step in range(1, 200):
                writer.charge(run, 0, step, release)
    spent = Ledger(ledger.path).spent()
    assert set(spent) == {RELEASE, large} and epsilon(spent, 1e-4) <= 3.0
    assert all(epsilon(merged(spent, {one: 1}), 1e-4) > 3.0 for one in spent)


@pytest.mark.parametrize("damage", ["changed", "missing", "swapped", "inserted"])
def test_a_line_that_is_not_as_it_was_is_named(ledger, damage):
    for step in range(5):
        ledger.charge("a", 0, step, RELEASE)
    lines = ledger.path.read_text().splitlines(keepends=True)
    match damage:
        case "changed":
            lines[3] = lines[3].replace('"noise_multiplier":4.0', '"noise_multiplier":9.0')
        case "missing":
            del lines[3]
        case "swapped":
            lines[3], lines[4] = lines[4], lines[3]
        case "inserted":
            lines.insert(3, lines[2])
    ledger.path.write_text("".join(lines))
    with pytest.raises(UserError, match="line 4 was changed"):
        Ledger(ledger.path)


def test_a_half_written_line_is_cut_off_and_that_is_on_record(ledger):
    ledger.charge("a", 0, 0, RELEASE)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"number":3,"kind":"st')
    again = Ledger(ledger.path)
    assert again.spent() == {RELEASE: 1}
    again.charge("a", 0, 1, RELEASE)
    assert [entry["kind"] for entry in again.entries] == ["budget", "torn"] and Ledger(ledger.path).number == 4
    assert json.loads(ledger.path.read_text().splitlines()[2])["payload"]["text"].startswith('{"number":3')


def test_entries_cut_off_at_the_end_show_against_what_was_noted(ledger):
    ledger.charge("a", 0, 0, RELEASE)
    number, head = ledger.number, ledger.head
    assert Ledger(ledger.path).remembers(number, head) and ledger.remembers(0, "")
    ledger.path.write_text("".join(ledger.path.read_text().splitlines(keepends=True)[:-1]))
    assert not Ledger(ledger.path).remembers(number, head)


def test_killed_at_any_moment_the_ledger_has_every_step_that_was_taken(ledger, tmp_path):
    """kill -9 between any two instructions, two runs at once: each update that happened was paid for."""
    rng = random.Random(0)
    for turn in range(4):
        done = [tmp_path / f"done_{run}_{turn}" for run in ("a", "b")]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CHARGES, str(ledger.path), str(file), run],
                cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )
            for run, file in zip(("a", "b"), done, strict=True)
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout is not None and process.stdout.readline() == "started\n"
            while not all(file.exists() and file.stat().st_size for file in done):
                assert [process.poll() for process in processes] == [None, None], "one ended before it was killed"
                time.sleep(0.01)
            time.sleep(rng.uniform(0.01, 0.2))
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.communicate()
        assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
        with ledger.path.open("rb") as file:
            charged = {
                (entry["run"], entry["payload"]["restart"], entry["payload"]["step"])
                for entry in map(json.loads, file.read().splitlines()[: Ledger(ledger.path).number])
                if entry["kind"] == "step"
            }
        for run, file in zip(("a", "b"), done, strict=True):
            taken = {(run, *map(int, line.split())) for line in file.read_text().splitlines() if line.count(" ") == 1}
            assert taken and taken <= charged
    assert Ledger(ledger.path).restarts("a") == 4


def test_names_that_are_spelt_alike_have_ledgers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path))
    assert ledger_path("digits") == tmp_path / "digits.jsonl"
    assert len({ledger_path(name) for name in ("a/b", "a_b", "a b", "../a b")}) == 4
    assert all(ledger_path(name).parent == tmp_path for name in ("../x", "/etc/passwd"))
