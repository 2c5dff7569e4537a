"""The privacy ledger: no step without a charge, and no undetected change of an entry."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, epsilon, merged
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.ledger import Ledger, _canonical, _hash, ledger_path
from dito_jax.privacy.ledger_file import exclusive


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
        number = Ledger(ledger.path).number  # which cuts off a line that was half written, and notes that
        charged = {
            (entry["run"], entry["payload"]["restart"], entry["payload"]["step"])
            for entry in map(json.loads, ledger.path.read_bytes().splitlines()[:number])
            if entry["kind"] == "step"
        }
        for run, file in zip(("a", "b"), done, strict=True):
            taken = {(run, *map(int, line.split())) for line in file.read_text().splitlines() if line.count(" ") == 1}
            assert taken and taken <= charged
    assert Ledger(ledger.path).restarts("a") == 4


def test_a_charge_is_synced_before_it_returns(ledger, monkeypatch):
    """A kill keeps what the kernel has, a power cut does not."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(ledger.path.read_bytes()))
    ledger.charge("a", 0, 0, RELEASE)
    assert synced == [ledger.path.read_bytes()]


def test_names_that_are_spelt_alike_have_ledgers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path))
    assert ledger_path("digits") == tmp_path / "digits.jsonl"
    assert len({ledger_path(name) for name in ("a/b", "a_b", "a b", "../a b")}) == 4
    assert all(ledger_path(name).parent == tmp_path for name in ("../x", "/etc/passwd"))


def test_ledgers_of_several_threads_append_one_chain(ledger):
    """Each thread has an object of its own, as two runs in one process have; POSIX locks do not exclude threads."""
    begin = threading.Barrier(3)

    def charge(run):
        own = Ledger(ledger.path)
        begin.wait()
        for step in range(20):
            own.charge(run, 0, step, RELEASE)

    threads = [threading.Thread(target=charge, args=(run,)) for run in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Ledger(ledger.path)
    assert again.spent() == {RELEASE: 60} and again.number == 61 and again.spent("b") == {RELEASE: 20}


OTHER = """
import fcntl
import sys
with open(sys.argv[1], "ab+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_a_lock_is_kept_when_the_process_reads_the_file_elsewhere(ledger):
    """A POSIX lock is lost when any file object of the process is closed; earlier versions wait for the same lock."""
    other = lambda: subprocess.run([sys.executable, "-c", OTHER, ledger.path], capture_output=True, text=True)
    with exclusive(ledger.path):
        ledger.path.read_bytes()
        assert "BlockingIOError" in other().stderr
    assert other().returncode == 0


def add(path, **changes):
    """Appends an entry with a good hash, as another version of the program does; None removes a field."""
    lines = path.read_bytes().splitlines()
    previous = json.loads(lines[-1])["hash"] if lines else "0" * 64
    entry = {"number": len(lines) + 1, "time": 0.5, "kind": "step", "run": "a", "previous": previous} | changes
    with path.open("ab") as file:
        file.write(_canonical(entry | {"hash": _hash(entry)}) + b"\n")


STEP = {"restart": 0, "step": 1, "release": {"sampling_prob": 0.02, "noise_multiplier": 4.0}}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(kind="refund", payload={}), "it is of kind 'refund', known are budget, start, step, torn"),
        (dict(schema=2, payload=STEP), "it has schema version 2, known is 1"),
        (dict(schema="1", payload=STEP), "it has schema version 1, known is 1"),
        (dict(weight=2, payload=STEP), "it has the field 'weight', known are hash, kind, number"),
        (dict(payload=STEP | {"times": 5000}), "a step with an unknown or invalid field: 'times', known are restart"),
        (dict(payload=STEP | {"release": {"rounds": 9}}), "a step .* 'rounds', known are sampling_prob, noise_mul"),
        (dict(payload={"restart": 0}), "a step with an unknown or invalid field: .*'release'"),
        (dict(payload=STEP | {"release": {"sampling_prob": 0.02, "noise_multiplier": "4"}}), "a step with an unknown"),
        (dict(kind="budget", payload={"epsilon": 3.0, "delta": 2.0, "unit": "example"}), "a budget with an unknown"),
    ],
)
def test_an_entry_that_is_not_understood_is_refused(ledger, changes, said):
    """Skipped, a kind of entry that spends would be missing from epsilon; an unknown field was a traceback."""
    ledger.charge("a", 0, 0, RELEASE)
    add(ledger.path, **changes)
    for ask in (lambda: Ledger(ledger.path), lambda: ledger.charge("a", 0, 1, RELEASE)):
        with pytest.raises(UserError, match=f"digits.jsonl: line 3 cannot be used: .*{said}") as refusal:
            ask()
        assert "use the version that wrote the file" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_ledger_without_schema_versions_still_opens_and_goes_on_with_them(tmp_path):
    """The entries that dito_jax 0.2 wrote."""
    path = tmp_path / "old.jsonl"
    path.touch()
    whole = STEP["release"] | {"max_batch": None, "num_examples": None}
    add(path, kind="budget", run="", payload={"epsilon": 10.0, "delta": 1e-4, "unit": "example"})
    add(path, kind="start", payload={"restart": 0, "steps": 5, "release": whole, "versions": {}, "after": 0})
    add(path, payload=STEP | {"release": whole})
    add(path, kind="torn", run="", payload={"text": "{"})
    old = Ledger(path)
    assert old.spent("a") == {RELEASE: 1} and old.budget == Budget(10.0, 1e-4, "example") and old.restarts("a") == 1
    old.charge("a", 0, 2, RELEASE)
    assert Ledger(path).spent() == {RELEASE: 2}
    schemas = [json.loads(line).get("schema") for line in path.read_text().splitlines()]
    assert schemas == [None] * 4 + [1] and json.loads(ledger_text(tmp_path).splitlines()[0])["schema"] == 1


def ledger_text(folder):
    made = Ledger(folder / "new.jsonl")
    made.set_budget(Budget(10.0, 1e-4, "example"))
    return made.path.read_text()


def test_a_full_disk_names_the_ledger_and_charges_nothing(ledger, files_at_most):
    ledger.charge("a", 0, 0, RELEASE)
    before = ledger.path.read_bytes()
    with files_at_most(len(before) + 100), pytest.raises(UserError) as refusal:  # a part of the line has room
        ledger.charge("a", 0, 1, RELEASE)
    assert str(refusal.value).startswith(f"{ledger.path}: File too large: free some space")
    assert ledger.path.read_bytes() == before
    ledger.charge("a", 0, 1, RELEASE)
    assert Ledger(ledger.path).spent() == {RELEASE: 2} and Ledger(ledger.path).number == 3


@pytest.mark.parametrize("change", ["truncated", "exchanged"])
def test_a_file_that_is_changed_between_two_charges_is_noticed(ledger, tmp_path, change):
    for step in range(3):
        ledger.charge("a", 0, step, RELEASE)
    if change == "truncated":
        ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-1]))
    else:
        other = Ledger(tmp_path / "other.jsonl")
        other.set_budget(Budget(10.0, 1e-4, "example"))
        for step in range(9):
            other.charge("a", 0, step, RELEASE)
        other.path.replace(ledger.path)
    before = ledger.path.read_bytes()
    with pytest.raises(UserError, match="entry 4 is not the one that this process has read before"):
        ledger.charge("a", 0, 3, RELEASE)
    assert ledger.path.read_bytes() == before


def needed(text):
    return float(text.split("need a budget of epsilon ")[1].split()[0].rstrip("."))


def test_a_run_that_does_not_fit_is_told_the_budget_that_it_needs(ledger):
    ledger.set_budget(Budget(0.3, 1e-4, "example"))
    ledger.charge("a", 0, 0, RELEASE)
    with pytest.raises(UserError, match=r"because epsilon 0\.\d+ is spent; all 2000 steps need a budget") as refusal:
        ledger.start("b", RELEASE, 2000)
    wanted = needed(str(refusal.value))
    assert wanted == pytest.approx(epsilon({RELEASE: 2001}, 1e-4), rel=1e-3)
    ledger.set_budget(Budget(wanted, 1e-4, "example"))
    assert ledger.start("b", RELEASE, 2000) == 0


def test_a_second_run_is_told_if_both_do_not_fit(ledger):
    """Each fits alone; what is left is what remains after all that the first has planned."""
    budget = epsilon({RELEASE: 1500}, 1e-4)
    ledger.set_budget(Budget(budget, 1e-4, "example"))
    ledger.start("a", RELEASE, 1000)
    assert ledger.shortage("a", RELEASE, 1000) is None  # a restart replaces its own plan
    assert ledger.shortage("b", RELEASE, 400) is None
    ledger.charge("a", 0, 1, RELEASE)
    said = ledger.shortage("b", RELEASE, 1000)
    assert "(run a: 999 steps): 500 remain if those are taken" in said and "\n" not in said
    assert needed(said) == pytest.approx(epsilon({RELEASE: 2000}, 1e-4), rel=1e-3)
    assert ledger.start("b", RELEASE, 1000) == 0
    assert "(run b: 1000 steps): 499 remain" in ledger.shortage("a", RELEASE, 999)
    ledger.set_budget(Budget(needed(said), 1e-4, "example"))
    assert ledger.shortage("b", RELEASE, 1000) is None
