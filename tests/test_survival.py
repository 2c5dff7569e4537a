"""Fault tolerance end to end: training that is killed, preempted, hung, corrupted, and fed NaN."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from dito_jax.telemetry.goodput_report import read_accounts
from dito_jax.telemetry.heartbeat import read_beat
from dito_jax.telemetry.run_directory import RunDirectory

from .preloaded_python import Process


EVERY = 7
SMALL = [
    "configs/digits.py", "--model.depth", "1", "--model.width", "32", "--train.batch_size", "48",
    "--train.log_every", "5", "--evaluation.num_samples", "0", "--evaluation.grid", "10", "--sample.steps", "2",
    "--checkpoint.every", str(EVERY), "--guard.window", "20",
]  # fmt: skip
SHORT = ["--train.steps", "40"]
SLOW = "slow-rank@1:0.05"  # twenty steps a second at most, so that they can be hit


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One device a process, no inherited flags, and one compilation cache for all these processes."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")}
    return kept | {"DITO_CACHE": str(cache)}


class Program:
    """A process and its output."""

    def __init__(self, environment: dict[str, str], program: list[str], arguments: tuple):
        self.process = Process([*program, *arguments], env=environment)

    def ends(self, code: int, seconds: float = 400) -> str:
        """Waits until it ends, with this code."""
        said = self.process.communicate(timeout=seconds)[0]
        assert self.process.returncode == code, said
        return said

    def wait_until(self, what, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.002)


@pytest.fixture(scope="module")
def train(environment):
    """Starts train.py with the options above and others."""
    return lambda run, *more: Program(environment, ["train.py"], (*SMALL, "--run-dir", run, *more))


@pytest.fixture(scope="module")
def dito(environment):
    """Starts a dito verb."""
    return lambda verb, *arguments: Program(environment, ["-m", "dito_jax", verb], arguments)


@pytest.fixture(scope="module")
def digest(dito):
    """The hash of a run's parameters and averages."""
    return lambda run: dito("digest", run).ends(0).splitlines()[-1]


@pytest.fixture(scope="module")
def undisturbed(train, digest, tmp_path_factory) -> str:
    """The digest of forty steps to which nothing happened."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(run, *SHORT).ends(0)
    assert not (run / "incidents.md").exists()
    return digest(run)


def events(run: Path, *kinds: str) -> list[dict]:
    file = run / "events.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row["event"] in kinds]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


def beat(run: Path, process: int = 0):
    return read_beat(run / "heartbeats" / str(process))


def in_step(run: Path, least: int):
    return lambda: (at := beat(run)) is not None and at.step >= least and at.phase in ("step", "data")


def test_a_run_killed_twenty_times_ends_with_the_very_same_bits(train, digest, tmp_path):
    """kill -9, half of it in the middle of a save; at most the steps since the last save that was whole are lost."""
    run, chance, in_save = tmp_path / "killed", random.Random(0), 0
    long = ("--train.steps", "900")
    for _ in range(20):
        before = len(events(run, "start"))
        started = train(run, *long, "--faults.inject", SLOW)
        started.wait_until(lambda: len(events(run, "start")) > before)  # noqa: B023
        first = events(run, "start")[-1]["step"]
        started.wait_until(in_step(run, first + 1))
        if chance.random() < 0.5:
            started.wait_until(lambda: list((run / "checkpoints").glob("*.orbax-checkpoint-tmp")))
        else:
            time.sleep(chance.uniform(0, 1.5))
        started.process.send_signal(signal.SIGKILL)
        started.ends(-signal.SIGKILL)
        last = max(saved(run), default=0)
        half = list((run / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        in_save += bool(half)
        assert first <= last and beat(run).step - last <= (2 * EVERY if half else EVERY)
    assert in_save >= 5, "most kills missed the saves"
    train(run, *long).ends(0)
    train(tmp_path / "whole", *long).ends(0)
    assert digest(run) == digest(tmp_path / "whole")
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in told if "loss" in row]
    assert steps == list(range(5, 901, 5))


def test_preempted_it_loses_no_step_and_goodput_accounts_for_every_second(train, dito, digest, undisturbed, tmp_path):
    """By each signal once: exit code 75, the step is saved. Three restarts later the table adds up to the wall."""
    run, began = tmp_path / "run", time.time()
    for number, at in ((signal.SIGTERM, 3), (signal.SIGUSR1, 10), (signal.SIGINT, 25)):
        started = train(run, *SHORT, "--faults.inject", SLOW)
        started.wait_until(in_step(run, at))
        started.process.send_signal(number)
        said = started.ends(75, seconds=60)
        assert beat(run).step == max(saved(run)) and f"step {max(saved(run))} is saved" in said
    train(run, *SHORT).ends(0)
    wall = (run / "goodput.jsonl").stat().st_mtime - began
    assert digest(run) == undisturbed
    table = dito("goodput", run).ends(0)
    accounts = read_accounts(RunDirectory(run))
    assert accounts is not None and abs(accounts.total - wall) < 0.01 * wall, (accounts.total, wall)
    assert accounts.attempts == 4 and accounts.steps_redone == 0, table
    assert (run / "goodput.png").read_bytes().startswith(b"\x89PNG")


def test_preempted_during_evaluation_it_stops_at_once(train, undisturbed, digest, tmp_path):
    run = tmp_path / "run"
    started = train(run, *SHORT, "--sample.steps", "100000")
    started.wait_until(lambda: (at := beat(run)) is not None and at.phase == "eval")
    time.sleep(1)
    started.process.send_signal(signal.SIGTERM)
    started.ends(75, seconds=60)
    assert digest(run) == undisturbed and saved(run)[-1] == 40


def test_a_flipped_bit_is_found_and_the_step_before_taken(train, digest, dito, undisturbed, tmp_path):
    run = tmp_path / "run"
    faults = ("--faults.inject", "bitflip-ckpt@20", "term@20")
    train(run, *SHORT, *faults).ends(75)
    assert saved(run)[-1] == 20
    said = dito("checkpoint", "verify", run).ends(2)
    assert f"step 20: {run}/checkpoints/20: damaged (checksum mismatch of" in said and "step 14: good" in said
    train(run, *SHORT, *faults).ends(0)
    assert digest(run) == undisturbed
    (row,) = events(run, "quarantine")
    assert "/20: damaged" in row["said"] and "kept as 20.corrupt" in row["said"]
    assert events(run, "start")[-1]["step"] == 14
    listed = dito("checkpoint", "ls", run).ends(0)
    assert "20.corrupt" in listed and "set aside" in listed and row["said"] in (run / "incidents.md").read_text()


def test_a_false_step_is_refused_and_a_rollback_that_was_killed_is_finished(train, digest, tmp_path):
    """Step 28 renamed to 50; then killed after the rollback from 31 to 28 had begun, with steps 35 and 40 saved."""
    run = tmp_path / "first" / "run"
    train(run, *SHORT).ends(0)
    checkpoints = run / "checkpoints"
    (checkpoints / "28").rename(checkpoints / "50")
    said = train(run, *SHORT).ends(2).splitlines()[-1]
    assert f"{checkpoints}/50: holds step 28, not step 50: rename it to 28" in said
    (checkpoints / "50").rename(checkpoints / "28")
    (tmp_path / "first").rename(tmp_path / "moved")
    run, checkpoints = tmp_path / "moved" / "run", tmp_path / "moved" / "run" / "checkpoints"
    begun = {"event": "rollback_begun", "said": None, "step": 31, "to": 28, "batches": 3, "because": "a test"}
    with (run / "events.jsonl").open("a") as log:
        log.write(json.dumps({"time": time.time(), "process": 0} | begun) + "\n")
    train(run, *SHORT).ends(0)
    assert [row["step"] for row in events(run, "start")] == [0, 28] and saved(run) == [28, 35, 40]
    assert {path.name for path in checkpoints.glob("*.*")} == {"35.abandoned", "40.abandoned"}
    assert [row["said"] for row in events(run, "rollback")] == ["a test"]
    assert json.loads((run / "skips.json").read_text()) == [{"after": 28, "batches": 3, "because": "a test"}]


def test_on_a_full_disk_the_last_good_step_stays(train, digest, undisturbed, tmp_path):
    run = tmp_path / "run"
    said = train(run, *SHORT, "--faults.inject", "disk-full@21").ends(2)
    assert "Traceback" not in said and "File too large" in said.splitlines()[-1]
    assert saved(run) in ([7], [7, 14]), "the save before it may still have been on its way"
    train(run, *SHORT).ends(0)
    assert digest(run) == undisturbed and not list((run / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def test_a_nan_gradient_is_skipped_and_logged(train, digest, undisturbed, tmp_path):
    run = tmp_path / "run"
    said = train(run, *SHORT, "--faults.inject", "nan-grad@12").ends(0)
    sentence = "step 12 skipped: loss or gradient not finite."
    assert sentence in said and sentence in (run / "incidents.md").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["bad_steps"] for row in rows if row.get("bad_steps")} == {15: 1}
    assert all(row["loss"] == row["loss"] for row in rows if "loss" in row)
    assert digest(run) != undisturbed


def test_a_step_that_fails_once_is_run_again_and_counts(train, digest, undisturbed, tmp_path):
    run = tmp_path / "run"
    train(run, *SHORT, "--faults.inject", "transient-nan@12", "nan-grad@40", "--guard.rerun", "True").ends(0)
    (row,) = events(run, "transient")
    assert "step 12" in row["said"] and "but not when rerun" in row["said"]
    assert len(events(run, "reproduced")) == 1
    without_rerun = tmp_path / "other"
    train(without_rerun, *SHORT, "--faults.inject", "nan-grad@40").ends(0)
    assert digest(run) == digest(without_rerun) != undisturbed


SPIKES = ("--guard.burst", "3", "--guard.burst_window", "10", "--guard.spike_deviations", "20")


def test_repeated_spikes_roll_back_and_skip_their_data(train, digest, tmp_path):
    """And the run that a kill ends right after goes the same way."""
    for run, more in ((tmp_path / "whole", ()), (tmp_path / "killed", ("kill@26",))):
        faults = ("--faults.inject", "spike@22", "spike@23", "spike@24", *more)
        train(run, *SHORT, *SPIKES, *faults).ends(-9 if more else 0)
        if more:
            train(run, *SHORT, *SPIKES, *faults).ends(0)
        (row,) = events(run, "rollback")
        assert row["to"] == 21 and "3 of the steps 22 to 2" in row["said"] and row["said"] in (
            run / "incidents.md"
        ).read_text()  # fmt: skip
        (skip,) = json.loads((run / "skips.json").read_text())
        assert skip["after"] == 21 and skip["examples"] // 48 in (3, 4, 5, 6)
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps) and steps[-1] == 40
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_flipped_bit_in_one_devices_memory_is_found_and_the_run_goes_back(environment, tmp_path):
    """Two devices hold the parameters alike; one's copy changes, in silence, and trains on."""
    # With as many threads as devices, XLA's CPU devices were seen to wait for each other for ever.
    two = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "32"}
    run = tmp_path / "run"
    fault = (*SHORT, "--guard.check_replicas_every", "10", "--faults.inject", "bitflip-copy@24")
    Program(two, ["train.py"], (*SMALL, "--run-dir", run, *fault)).ends(0)
    (row,) = events(run, "divergence")
    assert row["step"] == 30 and "after step 20" in row["said"] and len(row["devices"]) == 1
    (back,) = events(run, "rollback")
    assert back["to"] == 14 and "in one of the steps 21 to 30" in back["said"]
    assert not events(run, "bad_step")


def test_a_run_that_does_not_recover_stops_with_a_report(train, tmp_path):
    run = tmp_path / "run"
    always = [f"nan-grad@{step}!" for step in (22, 23, 24)]
    said = train(run, *SHORT, *SPIKES, "--guard.rollbacks", "2", "--faults.inject", *always).ends(2)
    assert "after 2 rollbacks to step 21" in said.splitlines()[-1] and "Traceback" not in said
    report = (run / "incidents.md").read_text()
    assert report.count("rolled back to step 21") == 2 and "skipped" in report
    assert saved(run)[-1] == 21


def test_of_two_processes_one_hangs_and_both_start_again(dito, digest, environment, tmp_path):
    """The watchdog of each ends it with 86 and names the one behind; the supervisor starts both again."""
    options = (*SMALL, *SHORT, "--watchdog.floor_seconds", "15")
    dito("supervise", *options, "--processes", "2", "--run-dir", tmp_path / "whole").ends(0)
    run = tmp_path / "hangs"
    supervised = dito("supervise", *options, "--processes", "2", "--run-dir", run, "--faults.inject", "hang@26#1")
    said = supervised.ends(0, seconds=600)
    hangs = events(run, "hang")
    assert {row["process"] for row in hangs} == {0, 1}
    assert all("process 1 is behind: at step 26" in row["said"] for row in hangs), hangs
    assert "hang" in (run / "stacks-1.txt").read_text() and "exit code 86" in said
    assert len(events(run, "restart")) == 1 and events(run, "start")[-1]["step"] == 21
    assert digest(run) == digest(tmp_path / "whole")


def test_one_of_four_workers_is_lost_and_the_run_continues_with_three(dito, tmp_path):
    """The same batch of 48 on three devices: sixteen each, in two parts, as twelve were what a device held."""
    run = tmp_path / "run"
    options = (*SMALL, "--train.steps", "30", "--run-dir", run)
    supervised = dito("supervise", *options, "--processes", "4", "--faults.inject", "dead@17#2")
    supervised.ends(0, seconds=900)
    (lost,) = events(run, "worker_lost")
    assert "worker 2 is lost: continuing with 3 of 4 processes" in lost["said"]
    starts = events(run, "start")
    assert [row["processes"] for row in starts] == [4, 3] and starts[-1]["step"] in (7, 14)
    config = json.loads((run / "config.json").read_text())
    assert (config["mesh"]["data"], config["train"]["gradient_accumulation_steps"]) == (3, 2)
    assert saved(run)[-1] == 30


def test_two_processes_go_back_together(dito, tmp_path):
    """The rows of one are poisoned, both leave the steps out, and both pass over the same data."""
    run = tmp_path / "run"
    faults = ("--faults.inject", "nan-grad@22#1", "nan-grad@23#1", "nan-grad@24#1")
    dito("supervise", *SMALL, *SHORT, *SPIKES, *faults, "--processes", "2", "--run-dir", run).ends(0, seconds=600)
    assert [row["to"] for row in events(run, "rollback")] == [21] and len(events(run, "start")) == 1
    assert json.loads((run / "skips.json").read_text())[0]["examples"] >= 3 * 48 and saved(run)[-1] == 40
