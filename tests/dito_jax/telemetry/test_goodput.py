"""Goodput: every second of a run has exactly one kind, over all restarts."""

import collections
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dito_jax.cli import main as cli
from dito_jax.telemetry import clock as clocks
from dito_jax.telemetry.clock import run_clock
from dito_jax.telemetry.goodput import KINDS, Ledger, Phases, process_age
from dito_jax.telemetry.goodput_report import COLORS, account, read_accounts, table, timeline
from dito_jax.telemetry.heartbeat import Beat, Heartbeat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory, json_lines


class Clock:
    """Goes on when told to."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def begin(run: RunDirectory, clock: Clock, *, born: float) -> tuple[Ledger, Heartbeat]:
    """What a training process does as it starts."""
    previous = read_beat(run.heartbeats / "0")
    heartbeat = Heartbeat(run.heartbeats / "0", clock=clock)
    return Ledger(run, heartbeat, previous=previous, clock=clock, born=born), heartbeat


def row(start, end, steps=None, *, attempt=1, **more):
    """A row of one kind, "step"; `seconds` in `more` says otherwise."""
    return {"attempt": attempt, "from": start, "to": end, "steps": steps, "seconds": {"step": end - start}} | more


def spent(accounts):
    return {kind: pytest.approx(seconds, abs=1e-6) for kind, seconds in accounts.seconds.items() if seconds}


def test_the_innermost_phase_takes_the_time_and_rows_add_up(tmp_path):
    run, clock = RunDirectory(tmp_path), Clock()
    ledger, heartbeat = begin(run, clock, born=990.0)
    with ledger.phase("restore"):
        clock.sleep(1)
        with ledger.phase("compile"):
            clock.sleep(2)
            assert heartbeat.last == Beat(0, "compile", 1001.0, 1001.0)
        clock.sleep(4)
        assert heartbeat.last.phase == "restore"
    clock.sleep(8)
    ledger.resumed(20)
    for number in (21, 22):
        ledger.step(number)
        with pytest.raises(StopIteration), ledger.phase("data"):
            clock.sleep(16)
            raise StopIteration
        assert heartbeat.last == Beat(number, "step", clock.now, clock.now)
        clock.sleep(32)
    ledger.flush()
    clock.sleep(64)
    ledger.close()
    began, resumed, interval, last = json_lines(run.goodput)
    assert (began["from"], began["to"], began["seconds"], began["died"]) == (990, 1000, {"init": 10}, None)
    assert (resumed["seconds"], resumed["steps"]) == ({"init": 8, "restore": 5, "compile": 2}, None)
    assert resumed["resumed"] == 20 and last["closed"]
    assert (interval["seconds"], interval["steps"]) == ({"data": 32, "step": 64}, [21, 22])
    assert (last["seconds"], last["steps"]) == ({"step": 64}, [22, 22])
    for before, after in zip([began, resumed, interval], [resumed, interval, last], strict=True):
        assert before["to"] == after["from"]


def test_nothing_is_written_where_no_time_went_by_or_there_is_no_ledger(tmp_path):
    run, clock = RunDirectory(tmp_path), Clock()
    phases = Phases(heartbeat := Heartbeat(run.heartbeats / "1", clock=clock))
    phases.resumed(6)
    assert heartbeat.last == Beat(6, "init", 1000.0, 1000.0)
    phases.step(7)
    with phases.phase("save"):
        phases.flush()
        assert heartbeat.last == Beat(7, "save", 1000.0, 1000.0)
    phases.close()
    assert not run.goodput.exists()
    ledger, _ = begin(run, clock, born=999.0)
    ledger.flush()
    assert len(json_lines(run.goodput)) == 1


def test_a_row_that_reaches_across_the_restored_step_is_lost_in_proportion():
    mixed = {"data": 2.0, "step": 6.0, "compile": 2.0}
    rows = [row(0, 10, [1, 4], seconds=mixed, resumed=3), row(10, 14, [4, 5]), row(14, 15, resumed=2)]
    accounts = account(rows, 15)
    # First 8 s of four steps lose their quarter, 2 s; then all of 4 and 5, and one more of the three that were left.
    assert spent(accounts) == {"data": 1.0, "step": 3.0 + 1.0, "compile": 2.0, "lost": 2.0 + 4.0 + 2.0}
    assert (accounts.steps_redone, accounts.rollbacks, accounts.attempts) == (1 + 3, 1, 1)
    assert accounts.goodput == pytest.approx(4 / 15)


def test_clocks_that_are_set_back_and_processes_that_overlap_count_no_second_twice(tmp_path):
    run, clock = RunDirectory(tmp_path), Clock()
    ledger, heartbeat = begin(run, clock, born=990.0)
    ledger.step(1)
    clock.sleep(10)
    ledger.flush()
    with ledger.phase("save"):
        clock.sleep(-5)
    clock.sleep(10)
    ledger.flush()
    heartbeat.alive()
    ledger, _ = begin(run, clock, born=1001.0)
    ledger.close()
    accounts = account(json_lines(run.goodput), clock.now)
    assert spent(accounts) == {"init": 10, "step": 15}


class Life:
    """A run by chance, and books of it that are kept stretch by stretch: [seconds, kind, step or None]."""

    def __init__(self, run: RunDirectory, seed: int):
        self.run, self.dice, self.clock = run, random.Random(seed), Clock()
        self.books: list[list] = []
        self.saved, self.reached, self.redone = [0], 0, 0
        self.number: int | None = None  # the step being worked on

    def chance(self, of: float) -> bool:
        return self.dice.random() < of

    def spend(self, kind: str) -> None:
        seconds = self.dice.random()
        self.clock.sleep(seconds)
        self.books.append([seconds, kind, self.number])

    def phase(self, kind: str) -> None:
        with self.ledger.phase(kind):
            self.spend(kind)
        self.heartbeat.alive()

    def write(self) -> None:
        self.ledger.flush()
        self.written = len(self.books)

    def resume(self, step: int) -> None:
        self.ledger.resumed(step)
        for stretch in self.books:
            if stretch[1] in ("data", "step", "eval", "save") and stretch[2] and stretch[2] > step:
                stretch[1] = "lost"
        self.saved = [at for at in self.saved if at <= step]
        self.redone, self.reached, self.number = self.redone + self.reached - step, step, None
        self.written = len(self.books)

    def step(self, number: int) -> None:
        self.ledger.step(number)
        self.number, self.reached = number, max(self.reached, number)
        self.phase("data")
        self.spend("step")
        self.heartbeat.alive()
        if self.chance(0.3):
            self.write()
        if self.chance(0.2):
            self.phase("eval")
        if self.chance(0.2):
            self.phase("save")
            self.saved.append(number)
            self.write()

    def attempt(self) -> None:
        """From a birth to a kill, which may come before anything is restored, and the time until the next birth."""
        self.number, born = None, self.clock()
        self.spend("init")
        self.ledger, self.heartbeat = begin(self.run, self.clock, born=born)
        self.written = len(self.books)
        self.phase("compile")
        self.phase("restore")
        killed = self.clock() + self.dice.uniform(-5, 30)
        if self.clock() < killed:
            self.resume(self.saved[-1] if self.chance(0.8) else self.dice.choice(self.saved))
        while self.clock() < killed:
            self.step(self.reached + 1)
            if self.chance(0.1):
                self.phase("restore")
                self.resume(self.saved[-1])
        for stretch in self.books[self.written :]:
            stretch[1] = "lost"
        self.number, self.ended = None, self.clock()
        self.spend("idle")


@pytest.mark.parametrize("seed", range(25))
def test_a_run_of_kills_rollbacks_and_restarts_adds_up(tmp_path, seed):
    life = Life(RunDirectory(tmp_path), seed)
    began = life.clock()
    for _ in range(2 + seed % 5):
        life.attempt()
    life.books.pop()
    accounts = read_accounts(life.run)
    assert accounts is not None
    want = collections.Counter()
    for seconds, kind, _ in life.books:
        want[kind] += seconds
    assert spent(accounts) == dict(want)
    assert accounts.total == pytest.approx(life.ended - began, abs=1e-9)
    assert accounts.steps_redone == life.redone
    edges = [(span.start, span.end) for span in accounts.spans]
    assert edges[0][0] == began and edges[-1][1] == pytest.approx(life.ended, abs=1e-6)
    assert all(math.isclose(before[1], after[0], abs_tol=1e-6) for before, after in itertools.pairwise(edges))
    for kind in KINDS:
        drawn = math.fsum(span.end - span.start for span in accounts.spans if span.kind == kind)
        assert drawn == pytest.approx(accounts.seconds[kind], abs=1e-6)


WORKER = """
import os, signal, sys, threading, time
from dito_jax.telemetry.clock import run_clock
from dito_jax.telemetry.goodput import Ledger
from dito_jax.telemetry.heartbeat import Heartbeat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory

run, state, dies = RunDirectory(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
previous = read_beat(run.heartbeats / "0")
clock = run_clock(run)
heartbeat = Heartbeat(run.heartbeats / "0", clock=clock)
ledger = Ledger(run, heartbeat, previous=previous, clock=clock)

def live():
    while True:
        time.sleep(0.005)
        heartbeat.alive()

threading.Thread(target=live, daemon=True).start()
with ledger.phase("restore"):
    time.sleep(0.1)
ledger.resumed(state)
for number in range(state + 1, 7):
    ledger.step(number)
    with ledger.phase("data"):
        time.sleep(0.1)
    time.sleep(0.2)
    if number == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    if number % 2 == 0:
        with ledger.phase("save"):
            time.sleep(0.1)
        ledger.flush()
        print(number, flush=True)
ledger.close()
print("closed", flush=True)
"""


def test_killed_twice_and_restarted_it_adds_up_to_the_time_on_the_wall(tmp_path):
    started, ended, run = time.time(), 0.0, RunDirectory(tmp_path)
    for state in (0, 2, 4):
        # Killed in the step after the next save but one: it was not written down, and its own save was not reached.
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(state), "0" if state == 4 else str(state + 4)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said, ended = process.stdout.read(), time.time()
        assert (said, process.returncode) == (("6\nclosed\n", 0) if state == 4 else (f"{state + 2}\n", -signal.SIGKILL))
        time.sleep(0.3)
    accounts = read_accounts(run)
    assert accounts is not None
    wall = ended - started
    assert accounts.total == pytest.approx(wall, rel=0.01)
    assert (accounts.attempts, accounts.steps_redone, accounts.rollbacks) == (3, 4, 0)
    least = {"restore": 0.3, "data": 0.6, "step": 1.2, "save": 0.3, "lost": 0.7, "idle": 0.6}
    assert {kind for kind in least if accounts.seconds[kind] < least[kind] - 0.01 * wall} == set()
    assert {kind: accounts.seconds[kind] for kind in ("eval", "compile")} == {"eval": 0, "compile": 0}


def test_a_running_process_has_lost_nothing_yet_and_a_dead_one_has(tmp_path):
    run = RunDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), "0", "0"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"2\n"
        time.sleep(0.2)
        running = read_accounts(run)
        process.kill()
        deadline = time.monotonic() + 30
        while process_age(process.pid) is not None and time.monotonic() < deadline:  # a zombie is no running process
            time.sleep(0.01)
        dead = read_accounts(run)
    assert running is not None and running.seconds["lost"] == 0 and running.seconds["step"] > 0.3
    assert dead is not None and dead.seconds["lost"] > 0.15


def test_a_run_has_one_clock_in_all_its_starts_though_the_time_of_day_is_set(tmp_path, monkeypatch):
    """An hour is added between two starts, and two are taken back before a third; a new boot has another clock."""
    run, day = RunDirectory(tmp_path), [1e9]
    monkeypatch.setattr(time, "time", lambda: day[0])
    for change in (0, 3600, -7200):
        day[0] += change
        clock = run_clock(run)
        heartbeat = Heartbeat(run.heartbeats / "0", clock=clock)
        Ledger(run, heartbeat, previous=None, clock=clock, born=clock()).close()
        heartbeat.close()
    accounts = read_accounts(run)
    assert accounts is not None and accounts.attempts == 3 and accounts.total < 10
    assert abs(run_clock(run)() - 1e9) < 10
    monkeypatch.setattr(clocks, "boot_id", lambda: "another boot")
    assert abs(run_clock(run)() - day[0]) < 10


def test_a_process_that_runs_is_known_though_the_time_of_day_is_set(tmp_path, monkeypatch):
    run, clock = RunDirectory(tmp_path), run_clock(RunDirectory(tmp_path))
    heartbeat = Heartbeat(run.heartbeats / "0", clock=clock)
    Ledger(run, heartbeat, previous=None, clock=clock)
    time.sleep(0.05)
    heartbeat.alive()
    for day in (time.time() - 7200, time.time() + 7200):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda now=day: now)
            accounts = read_accounts(run)
        assert accounts is not None and accounts.seconds["lost"] == 0, "of a dead process the last 0.05 s are lost"


ODD = [
    b"[1]", b"3", b"null", b'"x"', b"{}", b"[" * 100_000, b"\xff\xfe", b'{"attempt": 1}',
    b'{"attempt": true, "from": 0, "to": 1, "seconds": {}}', b'{"attempt": 1, "from": "a", "to": 1, "seconds": {}}',
    b'{"attempt": 1, "from": 0, "to": 1, "seconds": {"step": "a"}}',
    b'{"attempt": 1, "from": 0, "to": 1, "seconds": {"nap": 1}}',
    b'{"attempt": 1, "from": 0, "to": 1, "seconds": {}, "steps": [1]}',
    b'{"attempt": 1, "from": 0, "to": 1, "seconds": {}, "resumed": "a"}',
]  # fmt: skip


def test_odd_lines_change_no_figure(tmp_path):
    run = RunDirectory(tmp_path)
    whole = account(ROWS, 200)
    for line in ODD:
        run.goodput.write_bytes(b"".join(json.dumps(each).encode() + b"\n" + line + b"\n" for each in ROWS))
        assert read_accounts(run) == whole, line[:100]
        ledger, _ = begin(run, Clock(300.0), born=300.0)
        ledger.close()
        assert json_lines(run.goodput)[-1]["attempt"] == 3


ROWS = [
    row(0, 50, [1, 5], pid=0, host="", died=None, reached=None),
    row(50, 100, [6, 10], resumed=5),
    row(150, 200, [6, 10], attempt=2, died=100.0, reached=6, resumed=10, closed=True),
]


def test_the_table_says_it_all():
    lines = table(account(ROWS, 200)).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", *KINDS, "total", "goodput"]
    figures = {line.split()[0]: line.split()[1:] for line in lines}
    assert figures["step"] == ["100.0", "50.00%"] and figures["lost"] == ["50.0", "25.00%"]
    assert figures["idle"] == ["50.0", "25.00%"] and figures["total"] == ["200.0", "100.00%"]
    assert lines[-1] == "goodput 50.00%; attempts 2, restarts 1, rollbacks 0, steps redone 5"


def test_the_picture_has_a_bar_for_each_attempt_in_its_place_and_colour(tmp_path):
    timeline(account(ROWS, 200), tmp_path / "goodput.png")
    with Image.open(tmp_path / "goodput.png") as image:
        pixels = np.asarray(image.convert("RGB"))

    def bars(kind):
        """(rows, columns) of each bar of a colour; what is narrow belongs to the legend."""
        wanted = np.array([int(COLORS[kind][i : i + 2], 16) for i in (1, 3, 5)])
        mask = (pixels == wanted).all(-1)
        rows = np.flatnonzero(mask.sum(1) > 100)
        groups = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return [(group, np.flatnonzero(mask[group[0]])) for group in groups if len(group)]

    (upper, worked), (lower, again) = bars("step")
    [(beside, lost)] = bars("lost")
    assert list(beside) == list(upper) and upper[-1] < lower[0]
    wide = len(worked)
    assert abs(len(lost) - wide) <= 2 and abs(len(again) - wide) <= 2
    assert 0 < lost[0] - worked[-1] <= 2 and abs(again[0] - lost[-1] - wide) <= 3


def test_the_verb_prints_the_table_and_draws(tmp_path, monkeypatch, capsys):
    ledger, _ = begin(RunDirectory(tmp_path), Clock(), born=900.0)
    ledger.close()
    monkeypatch.setattr(sys, "argv", ["dito", "goodput", str(tmp_path)])
    cli.main()
    out = capsys.readouterr().out
    assert "init             100.0  100.00%\n" in out and out.endswith(f"{tmp_path / 'goodput.png'}\n")
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_needs_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dito", "goodput", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dito: ")]
    assert line == f"dito: {tmp_path}: no goodput.jsonl here; give a directory that train.py made."
