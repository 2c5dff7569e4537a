"""Progress: a bar on a terminal, plain lines otherwise, and the time left."""

import io
import threading
import time

import pytest

from dito_jax.telemetry.progress import Progress, ProgressMeter, as_clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_gets_one_plain_line_each_interval(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    now = [0.0]
    progress = Progress(100, step=40, clock=lambda: now[0])
    now[0] = 20.0
    progress.show(50, {"loss": 0.123456, "images/s": 1234.5})
    now[0] = 3600.0
    progress.show(60, {"loss": 0.1})
    progress.rewind(50)
    now[0] += 1.0
    progress.show(60, {"loss": 0.1})
    progress.close()
    assert log.getvalue().splitlines() == [
        "step 50/100  loss 0.1235  images/s 1234  1:40 left",
        "step 60/100  loss 0.1  2:00:00 left",
        "step 60/100  loss 0.1  0:04 left",
    ]


@pytest.mark.parametrize("step, share", [(0, "0%"), (40, "40%")])
def test_terminal_gets_a_bar_that_counts_the_steps_before(monkeypatch, step, share):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(100, step=step)
    progress.show(50, {"loss": 0.123456})
    progress.close()
    frames = terminal.getvalue().strip("\r").split("\r")
    assert share in frames[0] and f"{step}/100" in frames[0]
    assert "50%" in frames[-1] and "50/100" in frames[-1] and "loss 0.1235" in frames[-1]


def test_meter_tells_the_time_left_by_what_is_done_or_by_the_last_time():
    now, beats = [0.0], []
    meter = ProgressMeter("sampling", 500, expected=90.0, clock=lambda: now[0], beat=lambda: beats.append(now[0]))
    now[0] = 30.0
    assert meter.line() == "sampling 0/500 images, about 1:00 left"
    now[0] = 100.0
    assert meter.line() == "sampling 0/500 images, 1:40 so far"
    meter.add(100)
    meter.add(100)
    assert meter.line() == "sampling 200/500 images, 2:30 left" and beats == [100.0, 100.0]
    assert ProgressMeter("compiling", clock=lambda: now[0]).line() == "compiling, 0:00 so far"
    assert as_clock(7265.4) == "2:01:05"


def test_meter_prints_while_a_task_blocks_and_nothing_for_a_short_one(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with ProgressMeter("reading", 10, unit="files") as meter:
        meter.add(10)
    with ProgressMeter("drawing", 10, shown=False, interval=0.001):
        time.sleep(0.02)
    assert log.getvalue() == ""
    with ProgressMeter("compiling", interval=0.005):
        while "compiling, 0:00 so far" not in log.getvalue():
            time.sleep(0.001)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_meter_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with ProgressMeter("sampling", 4) as meter:
        meter.add(4)
    assert "sampling" in terminal.getvalue() and "0/4" in terminal.getvalue()
