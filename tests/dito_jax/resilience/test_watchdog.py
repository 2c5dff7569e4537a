"""The watchdog: a hung process exits with code 86 and reports where it was; a slow one continues."""

import random
import re
import signal
import time

import pytest

from dito_jax.errors import HUNG
from dito_jax.resilience.watchdog import Sign, Watchdog, WatchdogConfig, behind, step_seconds
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.heartbeat import Beat, Heartbeat
from dito_jax.telemetry.run_directory import RunDirectory


# A run of short steps, in which the last argument is executed before each.
RUN = """
import ctypes, os, resource, signal, sys, time
import numpy as np
from pathlib import Path
from jax.experimental import multihost_utils
from dito_jax import distributed
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.heartbeat import Heartbeat
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.resilience.watchdog import Watchdog, WatchdogConfig

def falls_asleep():
    time.sleep(100)

distributed.join()
me, run = distributed.index(), RunDirectory(sys.argv[1])
heartbeat = Heartbeat(run.heartbeats / str(me))
events = Events(run, process=me)
events.record("start", step=0)
with Watchdog(heartbeat, run, events, WatchdogConfig(2.0, 3.0, 6.0), process=me) as watchdog:
    for step in range(1, 200):
        heartbeat.beat(step, "data")
        exec(sys.argv[2])
        heartbeat.beat(step, "step")
        if distributed.count() > 1:
            multihost_utils.process_allgather(np.array(step))
        time.sleep(0.02)
        if step == 5:
            print("going", flush=True)
print("done", flush=True)
"""


def test_a_step_that_sleeps_is_ended_and_its_stack_kept(tmp_path, start, finish):
    (run,) = start(RUN, tmp_path, "if step == 50: falls_asleep()")
    assert run.stdout.readline() == "going\n"
    began = time.monotonic()
    out, err = finish(run, HUNG)
    assert time.monotonic() - began < 30 and "done" not in out
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert "in falls_asleep" in stacks and "in falls_asleep" in err and "at step 50 (data)" in stacks
    assert err.splitlines()[-1].startswith("process 0 hangs: at step 50 (data) since 2.")
    assert "'event': 'start'" in err
    (hang,) = read_events(RunDirectory(tmp_path), "hang")
    assert (hang["step"], hang["phase"], hang["said"]) == (50, "data", err.splitlines()[-1])


def test_it_ends_though_the_main_thread_is_in_c_and_the_disk_is_full(tmp_path, start, finish):
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)); ctypes.CDLL(None).sleep(100)"
    (run,) = start(RUN, tmp_path, f"if step == 50: {full}")
    _, err = finish(run, HUNG)
    assert "UserError" in err and "process 0 hangs: at step 50 (data)" in err


def test_a_stop_that_takes_too_long_is_ended(tmp_path, start, finish):
    hurry = "if 50 <= step <= 52: watchdog.expect_within((1, 100, 10)[step - 50])\nif step >= 50: time.sleep(0.3)"
    (run,) = start(RUN, tmp_path, hurry)
    _, err = finish(run, HUNG)
    assert re.search(r"at step 5\d \(\w+\) since 0.\d s, and did not stop in time after a stop request", err)


SLOWER = """
if step < 14: time.sleep(0.1 * 1.3 ** step)
elif step > 20: sys.exit()
"""


def test_steps_that_grow_slower_are_let_be(tmp_path, start, finish):
    (run,) = start(RUN, tmp_path, SLOWER)
    finish(run, 0)


def test_other_phases_have_their_own_deadline(tmp_path, start, finish):
    compiles = "if step == 50: heartbeat.beat(50, 'compile'); time.sleep({})"
    (run,) = start(RUN, tmp_path, compiles.format(4))
    assert finish(run, 0)[0] == "going\ndone\n"
    (run,) = start(RUN, tmp_path, compiles.format(100))
    assert "at step 50 (compile) since 6." in finish(run, HUNG)[1]


@pytest.mark.parametrize("hanging", [0, 1])
def test_two_processes_end_and_say_who_is_behind(hanging, tmp_path, start, finish):
    both = start(RUN, tmp_path, f"if step == 20 and me == {hanging}: falls_asleep()", count=2)
    for run in both:
        _, err = finish(run, HUNG)
        assert re.search(
            rf"process {hanging} is behind: at step 20 \(data\) since \d+.\d s; the others are at step 2", err
        )
    assert "in falls_asleep" in (tmp_path / f"stacks-{hanging}.txt").read_text()
    assert {event["process"] for event in read_events(RunDirectory(tmp_path), "hang")} == {0, 1}


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (1, "process 1 is frozen, last seen at step "),
        (0, "process 0, which holds the key-value store, does not answer"),
    ],
)
def test_one_that_is_frozen_is_named_by_the_other(frozen, said, tmp_path, start, finish):
    both = start(RUN, tmp_path, "", count=2)
    for run in both:
        while run.stdout.readline() != "going\n":
            pass
    time.sleep(1)  # until each has been heard of
    both[frozen].send_signal(signal.SIGSTOP)
    assert said in finish(both[1 - frozen], HUNG)[1]


def test_progress_within_a_phase_counts_and_leaves_the_steps_in_memory(tmp_path):
    now = [0.0]
    heartbeat = Heartbeat(tmp_path / "0", clock=lambda: now[0], monotonic=lambda: now[0])
    watchdog = Watchdog(heartbeat, run := RunDirectory(tmp_path), Events(run), WatchdogConfig(20.0, 10.0, 500.0))
    heartbeat.beat(1, "step")
    now[0] = 7.0
    for _ in range(1000):
        heartbeat.beat(1, "eval")
        now[0] += 1.0
    assert heartbeat.recent[-1].since == 1006.0 and watchdog.deadline() == 500
    heartbeat.beat(2, "step")
    assert watchdog.deadline() == 70


def test_the_slowest_of_the_last_hundred_steps_sets_the_deadline(tmp_path):
    now = [0.0]
    jumps = random.Random(0)  # the time of day may be set while the process runs
    heartbeat = Heartbeat(tmp_path / "0", clock=lambda: jumps.uniform(0, 1e6), monotonic=lambda: now[0])
    watchdog = Watchdog(heartbeat, run := RunDirectory(tmp_path), Events(run), WatchdogConfig(20.0, 10.0, 500.0))
    assert watchdog.deadline() == 500
    for step in range(1, 113):
        heartbeat.beat(step, "data")
        assert watchdog.deadline() == (70 if 11 <= step <= 110 else 20), step
        now[0] += 0.5
        heartbeat.beat(step, "step")
        now[0] += 7 if step == 10 else 1
        if step == 12:
            heartbeat.beat(step, "save")
            now[0] += 300


def test_a_phase_that_is_not_over_is_not_counted():
    phases = ((1, "data", 0.0), (1, "step", 1.0), (1, "eval", 3.0), (2, "data", 9.0))
    beats = [Beat(step, phase, 5e9, 5e9, moved) for step, phase, moved in phases]
    assert step_seconds(beats) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("signs", "silent", "said"),
    [
        (["50 data 12.3 7", "52 step 1 9"], set(), "process 0 is behind: at step 50 (data) since 12.3 s; {} 52 (step)"),
        (
            ["50 step 12.3 7", "50 data 11 9"],
            set(),
            "process 1 is behind: at step 50 (data) since 11.0 s; {} 50 (step)",
        ),
        (["9 step 12.3 7", "9 step 11 9"], set(), "no process is behind: all are at step 9 (step)"),
        (
            ["9 step 12.3 7", "9 eval 3 9"],
            {1},
            "process 1 is frozen, last seen at step 9 (eval) since 3.0 s; {} 9 (step)",
        ),
        (["50 step 1 7"], set(), "process 1 never published a status"),
        (
            ["7 data 1 7", "8 eval 1 9", "7 data 2 2"],
            set(),
            "processes 0, 2 are behind: at step 7 (data) since 1.0 s; at step 7 (data) since 2.0 s; {} 8 (eval)",
        ),
    ],
)
def test_who_is_behind(signs, silent, said):
    found = behind({i: Sign.of(text) for i, text in enumerate(signs)}, silent=silent, count=max(2, len(signs)))
    assert found == said.format("the others are at step")
