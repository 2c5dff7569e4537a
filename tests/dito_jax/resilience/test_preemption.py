"""Preemption: all processes save after the same step; with nothing to save the run stops at once."""

import os
import signal
import subprocess
import time

import pytest

from dito_jax.errors import PREEMPTED, Preempted
from dito_jax.resilience.preemption import SIGNALS, Preemption


# What a run does: it compiles, trains, and evaluates. Where it is, it says on stdout.
RUN = """
import contextlib, sys, time
import numpy as np
from jax.experimental import multihost_utils
from dito_jax import distributed
from dito_jax.errors import PREEMPTED, Preempted
from dito_jax.resilience.preemption import Preemption

steps, slow, grace = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])  # `slow`: the process that evaluates long

def main():
    with preemption.deferred():
        for step in range(1, steps + 1):
            if distributed.count() > 1:
                multihost_utils.process_allgather(np.array(step))
            time.sleep(0.05)
            if step == 3:
                print("training", flush=True)
            if preemption.requested(step):
                print("saved", step, flush=True)
                break
    print("evaluating", flush=True)
    if slow in (-1, distributed.index()):
        time.sleep(60)
    elif distributed.count() > 1:
        multihost_utils.process_allgather(np.array(0))

distributed.join()
try:
    with Preemption(grace, on_request=lambda seconds: print("hurry", seconds, flush=True)) as preemption:
        main()
except Preempted as stop:
    print(stop, file=sys.stderr)
    distributed.leave(PREEMPTED)
"""


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Reads stdout up to this line."""
    while (said := process.stdout.readline()) != f"{line}\n":
        assert said, process.stderr.read()


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_it_saves_after_a_step(number, start, finish):
    (run,) = start(RUN, 1000, -1, 60)
    wait_for(run, "training")
    run.send_signal(number)
    out, err = finish(run, PREEMPTED)
    assert "hurry 60.0" in out and "saved " in out and "evaluating" not in out
    assert err.splitlines()[0].startswith(f"{number.name}: saving after a step, then stopping, within 60 s")


@pytest.mark.parametrize("number", SIGNALS[:3])
def test_elsewhere_it_stops_at_once(number, start, finish):
    (run,) = start(RUN, 3, -1, 60)
    wait_for(run, "evaluating")
    run.send_signal(number)
    out, err = finish(run, PREEMPTED)
    assert "saved" not in out
    assert set(err.splitlines()) == {
        f"{number.name}: nothing to save, stopping now, within 60 s; a second signal ends the process at once.",
        "stopped after a stop signal; run the same command to continue.",
    }


# A signal may come between the interpreter's last look and a call that sleeps, which it then does not end. So here: the
# main thread hears nothing of the signal, another thread does.
ASLEEP = """
import signal, time
from dito_jax.errors import PREEMPTED, Preempted
from dito_jax.resilience.preemption import SIGNALS, Preemption
try:
    with Preemption(60):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        print("asleep", flush=True)
        time.sleep(60)
except Preempted:
    raise SystemExit(PREEMPTED)
"""


@pytest.mark.parametrize("number", SIGNALS[:3])
def test_one_that_came_just_before_a_sleep_ends_it(number, start, finish):
    (run,) = start(ASLEEP)
    wait_for(run, "asleep")
    run.send_signal(number)
    _, err = finish(run, PREEMPTED)
    assert "stopping now" in err and "did not stop in time" not in err


# Python drops what is raised in a callback of its garbage collector, and prints it.
COLLECTING = """
import gc, os, signal, time
from dito_jax.errors import PREEMPTED, Preempted
from dito_jax.resilience.preemption import Preemption

def hit(phase, info):
    gc.callbacks.remove(hit)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)

try:
    with Preemption(60):
        gc.callbacks.append(hit)
        gc.collect()
        time.sleep(60)
except Preempted:
    raise SystemExit(PREEMPTED)
"""


def test_one_that_the_garbage_collector_swallows_is_raised_again(start, finish):
    (run,) = start(COLLECTING)
    _, err = finish(run, PREEMPTED)
    assert len(err.splitlines()) == 1 and "stopping now" in err


@pytest.mark.parametrize(("number", "struck"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGINT, 1)])
def test_two_processes_stop_after_the_same_step(number, struck, start, finish):
    both = start(RUN, 1000, -1, 60, count=2)
    wait_for(both[0], "training")
    both[struck].send_signal(number)
    said = [finish(run, PREEMPTED) for run in both]
    saved = [[line for line in out.splitlines() if line.startswith("saved ")] for out, _ in said]
    assert saved[0] == saved[1] and len(saved[0]) == 1
    assert all("hurry 60.0" in out for out, _ in said)
    assert f"process {struck}: {number.name}: saving after a step" in said[struck][1]
    assert "process was preempted" in said[1 - struck][1].replace(f"process {struck}", "another process")


# The main thread is in C for longer than anybody waits, as in a compilation or a collective: no Python handler runs.
BLOCKED = """
import contextlib, ctypes, sys
from dito_jax import distributed
from dito_jax.resilience.preemption import Preemption
where, grace = sys.argv[1], float(sys.argv[2])
distributed.join()
with Preemption(grace) as preemption, preemption.deferred() if where == "loop" else contextlib.nullcontext():
    print("blocked", flush=True)
    ctypes.CDLL(None).system(b"exec sleep 15 >/dev/null 2>&1")
"""


@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)])
def test_a_second_signal_ends_it_at_once(number, count, start, finish):
    run = start(BLOCKED, "loop", 60, count=count)[-1]
    wait_for(run, "blocked")
    run.send_signal(number)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, err = finish(run, 128 + signal.SIGTERM)
    assert "SIGTERM again: ending now" in err


def test_what_is_stuck_with_nothing_to_save_is_ended_in_time(start, finish):
    (run,) = start(BLOCKED, "elsewhere", 2)
    wait_for(run, "blocked")
    time.sleep(1)  # until it is
    run.send_signal(signal.SIGTERM)
    _, err = finish(run, PREEMPTED)
    assert err.splitlines()[-1] == "did not stop in time: ending the process, nothing to save."


def test_signals_of_one_moment_are_one_request(start, finish):
    (run,) = start(RUN, 1000, -1, 60)
    wait_for(run, "training")
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGTERM)
    assert "saved" in finish(run, PREEMPTED)[0]


def test_a_process_that_waits_for_one_that_left_leaves_too(start, finish):
    both = start(RUN, 3, 1, 4, count=2)
    for run in both:
        wait_for(run, "evaluating")
    both[1].send_signal(signal.SIGUSR1)
    _, err = finish(both[0], PREEMPTED)
    assert "process 1 was preempted" in err
    finish(both[1], PREEMPTED)


FORKS = """
import os, signal, sys, time
from dito_jax.resilience.preemption import Preemption
with Preemption(60) as preemption, preemption.deferred():
    if not (child := os.fork()):
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.5)
    print(os.waitstatus_to_exitcode(status), preemption.requested(1))
"""


def test_a_signal_to_a_child_is_not_for_its_parent(start, finish):
    (run,) = start(FORKS)
    out, err = finish(run, 0)
    assert out == "-15 False\n" and "SIGTERM" not in err


def test_without_a_signal_nothing_happens_and_the_old_handlers_come_back(capsys):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption(60) as preemption:
        with preemption.deferred():
            assert not preemption.requested(1)
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert capsys.readouterr().err == ""


def test_one_noted_in_the_loop_is_raised_on_leaving_it(capsys):
    with pytest.raises(Preempted), Preemption(60) as preemption, preemption.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested(1)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption(60) as preemption, preemption.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)
