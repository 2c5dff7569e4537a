"""Progress: a bar on a terminal, plain lines otherwise."""

import io

import pytest

from dito_jax.telemetry.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_gets_one_plain_line_each_interval(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    progress = Progress(100, step=40)
    progress.show(50, {"loss": 0.123456, "images/s": 1234.5})
    progress.show(60, {"loss": 0.1})
    progress.close()
    assert log.getvalue() == "step 50/100  loss 0.1235  images/s 1234\nstep 60/100  loss 0.1\n"


@pytest.mark.parametrize("step, share", [(0, "0%"), (40, "40%")])
def test_terminal_gets_a_bar_that_counts_the_steps_before(monkeypatch, step, share):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(100, step=step)
    progress.show(50, {"loss": 0.123456})
    progress.close()
    frames = terminal.getvalue().strip("\r").split("\r")
    assert share in frames[0] and f"{step}/100" in frames[0]
    assert "50%" in frames[-1] and "50/100" in frames[-1] and "loss 0.1235" in frames[-1]
