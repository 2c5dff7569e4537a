"""Events and heartbeats survive a kill of the process that wrote them."""

import os
import struct
import subprocess
import sys

import pytest

from dito_jax.telemetry.events import Events, read_events, write_incidents
from dito_jax.telemetry.heartbeat import Heartbeat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory


def test_events_come_back_in_order_and_by_kind(tmp_path, capsys):
    events = Events(run := RunDirectory(tmp_path), process=3, clock=lambda: 12.5)
    events.record("start", step=0)
    events.record("skip", "step 4: the loss is not finite.", step=4)
    assert read_events(run, "skip") == [
        {"time": 12.5, "process": 3, "event": "skip", "said": "step 4: the loss is not finite.", "step": 4}
    ]
    assert [row["event"] for row in read_events(run)] == ["start", "skip"]
    assert capsys.readouterr().err == "step 4: the loss is not finite.\n"


def test_event_names_of_earlier_versions_are_read_as_the_current_ones(tmp_path):
    run = RunDirectory(tmp_path)
    run.events.write_text('{"time": 1.0, "process": 0, "event": "place_lost", "said": "place 2 is lost.", "slot": 2}\n')
    assert [row["slot"] for row in read_events(run, "worker_lost")] == [2] and not read_events(run, "place_lost")
    write_incidents(run)
    assert "place 2 is lost." in (tmp_path / "incidents.md").read_text()


def test_a_line_cut_short_spoils_no_other(tmp_path):
    events = Events(run := RunDirectory(tmp_path))
    events.record("start", step=0)
    with run.events.open("a") as file:
        file.write('{"event": "ha')
    assert [row["event"] for row in read_events(run)] == ["start"]
    events.record("start", step=7)
    assert [row["step"] for row in read_events(run)] == [0, 7]


def test_what_was_said_is_there_to_read_and_nothing_where_nothing_was(tmp_path):
    events = Events(run := RunDirectory(tmp_path), clock=lambda: 0.0)
    events.record("start", step=0)
    write_incidents(run)
    assert not (tmp_path / "incidents.md").exists()
    events.record("skip", "step 4: the loss is not finite.", step=4)
    write_incidents(run)
    assert (
        (tmp_path / "incidents.md").read_text().endswith("\n\n- 1970-01-01 00:00:00 step 4: the loss is not finite.\n")
    )


DIES = """
import os, signal, sys
from pathlib import Path
from dito_jax.telemetry.heartbeat import Heartbeat
Heartbeat(Path(sys.argv[1]), clock=lambda: 3.0).beat(41, "save")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_last_beat(tmp_path):
    subprocess.run([sys.executable, "-c", DIES, tmp_path / "beats/0"], check=False)
    beat = read_beat(tmp_path / "beats/0")
    assert beat is not None and (beat.step, beat.phase, beat.since, beat.alive) == (41, "save", 3.0, 3.0)


def test_alive_is_no_progress(tmp_path):
    times = iter([1.0, 2.0, 7.0])
    heart = Heartbeat(tmp_path / "0", clock=lambda: next(times))
    heart.beat(5, "step")
    heart.alive()
    beat = read_beat(tmp_path / "0")
    assert beat == heart.last and beat is not None and (beat.step, beat.since, beat.alive) == (5, 2.0, 7.0)


BROKEN = [None, b"", b"short", struct.pack("<qqdd", 1, 99, 1.0, 1.0), struct.pack("<qqdd", 1, -1, 1.0, 1.0),
          struct.pack("<qqdd", -1, 1, 1.0, 1.0), struct.pack("<qqdd", 1, 1, 1.0, float("nan"))]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_where_nothing_beats_there_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "0").write_bytes(content)
    assert read_beat(tmp_path / "0") is None


def test_a_file_that_is_truncated_or_deleted_does_not_end_the_process(tmp_path):
    heart = Heartbeat(tmp_path / "0", clock=lambda: 3.0)
    os.truncate(tmp_path / "0", 0)
    heart.alive()
    heart.beat(7, "step")
    beat = read_beat(tmp_path / "0")
    assert beat is not None and beat.step == 7
    (tmp_path / "0").unlink()
    heart.beat(8, "step")
    heart.close()
    heart.beat(9, "step")
    assert heart.last.step == 9 and read_beat(tmp_path / "0") is None


ODD = [b"[1]", b"3", b"{}", b'{"event": 3, "time": 1}', b'{"event": "start"}', b"[" * 100_000, b"\xff", b"\0" * 50]


def test_odd_lines_are_no_events(tmp_path):
    run = RunDirectory(tmp_path)
    events = Events(run, clock=lambda: 0.0)
    events.record("start", step=0)
    with run.events.open("ab") as log:
        log.write(b"".join(line + b"\n" for line in ODD) + b'{"event": "start", "time": 1, "step": "a"}\n')
    events.record("rollback", "back", step=5)
    assert [row["event"] for row in read_events(run)] == ["start", "start", "rollback"]
    assert [row["step"] for row in read_events(run, "start", step=int)] == [0]
    write_incidents(run)
    assert (tmp_path / "incidents.md").read_text().count("\n- ") == 1


def test_alive_undoes_no_beat_of_another_thread(tmp_path):
    heart = Heartbeat(tmp_path / "0")

    def clock() -> float:  # while one thread says that it is alive, another goes on
        heart._clock = lambda: 5.0
        heart.beat(6, "save")
        return 4.0

    heart._clock = clock
    heart.alive()
    beat = read_beat(tmp_path / "0")
    assert beat is not None and (beat.step, beat.phase) == (heart.last.step, heart.last.phase) == (6, "save")
