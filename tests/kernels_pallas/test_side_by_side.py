"""bench --jobs: the same rows as without it, memory that was short is asked for again alone, and a death is told."""

import contextlib
import csv
import os
import signal
import time

import pytest

from kernels_pallas.bench import main as bench, side_by_side


TIMES = ("median_us", "p20_us", "p80_us", "tflops", "gbps", "of_roofline", "date")
FOLDER = "SIDE_BY_SIDE_FOLDER"  # an environment variable, which the processes of --jobs inherit


def prepare(op, case, pass_):
    """A fake: it dies, leaves a file with its process's name, or does so at once."""
    if case == "dies":
        time.sleep(1)  # as one that compiles: what it has measured has left it
        os._exit(3)
    with open(os.path.join(os.environ[FOLDER], str(os.getpid())), "w"):
        return op, case, pass_


def finish(ready):
    """A row, which says whether this process was alone; "big" has not enough memory unless it is."""
    op, case, pass_ = ready
    beside = sum(map(alive, os.listdir(os.environ[FOLDER]))) - 1
    status = "XlaRuntimeError: RESOURCE_EXHAUSTED: no memory" if case == "big" and beside else "ok"
    return [{"op": op, "case": case, "pass": pass_, "status": status, "beside": str(beside)}]


def alive(process):
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def waiting_at_most(seconds):
    def stop(*_):
        raise TimeoutError(f"still waiting after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """What the processes inherit is set for one test."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for name in side_by_side.SHARED_MEMORY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def rows(path):
    with path.open() as file:
        return [{column: value for column, value in row.items() if column not in TIMES} for row in csv.DictReader(file)]


def test_two_processes_measure_what_one_does(tmp_path, capsys):
    serial, pair = tmp_path / "serial.csv", tmp_path / "pair.csv"
    words = ["qk_norm_rope", "--case", "tiny"]
    assert bench.main([*words, "--out", str(serial)]) == 0
    assert bench.main([*words, "--out", str(pair), "--jobs", "2"]) == 0
    assert rows(pair) == rows(serial)
    assert {row["pass"] for row in rows(pair)} == {"forward", "backward", "both"}  # a round of two, and one of one
    with pair.open() as file:
        assert all(float(row["median_us"]) > 0 for row in csv.DictReader(file) if row["status"] == "ok")


def test_what_ran_out_of_memory_is_measured_again_at_the_end_and_alone():
    tasks = [("toy", "big", "forward"), ("toy", "small", "forward"), ("toy", "big", "backward")]
    found = [row for rows in side_by_side.measure_all(prepare, finish, tasks, jobs=2) for row in rows]
    assert [(row["case"], row["pass"], row["status"], row["beside"]) for row in found] == [
        ("small", "forward", "ok", "1"),
        ("big", "forward", "ok", "0"),
        ("big", "backward", "ok", "0"),
    ]


def test_a_process_that_dies_ends_the_run_in_one_line_after_what_was_measured():
    tasks = [("toy", case, "forward") for case in ("first", "second", "dies", "never")]
    found = []
    with waiting_at_most(60), pytest.raises(RuntimeError, match=r"^a process of --jobs died, exit code 3$"):
        for rows in side_by_side.measure_all(prepare, finish, tasks, jobs=2):
            found += [row["case"] for row in rows]
    assert sorted(found) == ["first", "second"]
