"""metrics.jsonl and TensorBoard have each step once, after any kill or rollback."""

import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dito_jax.telemetry.metrics import MetricsWriter, read_metrics
from dito_jax.telemetry.run_directory import RunDirectory


ROOT = Path(__file__).parents[3]


def board_events(run: RunDirectory) -> list[Event]:
    """Every event of every TensorBoard file, in the order they were written."""
    events = []
    for path in sorted(run.tensorboard.iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            events.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += 12 + length + 4  # a record is its length, a checksum, the event, a checksum
    return events


def test_line_is_in_the_file_before_the_writer_is_closed(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as metrics:
        metrics.write(10, {"loss": 0.5, "cache": "hit", "mfu": None})
        metrics.write(20, {"loss": math.nan})
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        points = [value.simple_value for event in board_events(run) for value in event.summary.value]
    assert lines[0] == {"step": 10, "loss": 0.5, "cache": "hit", "mfu": None}
    assert lines[1]["step"] == 20 and math.isnan(lines[1]["loss"])
    assert points[0] == 0.5 and math.isnan(points[1])


WRITES = """
import sys
from dito_jax.telemetry.metrics import MetricsWriter
from dito_jax.telemetry.run_directory import RunDirectory
first = int(sys.argv[2])
with MetricsWriter(RunDirectory(sys.argv[1]), after=first - 1 if first else None) as metrics:
    for step in range(first, 10**9):
        metrics.write(step, {"loss": 1 / (step + 1)})
        if step == first + 100:
            print("writing", flush=True)
"""


def test_each_step_is_logged_once_after_kills_and_resumes(tmp_path):
    run, first = RunDirectory(tmp_path), 0
    for restored in (60, 90):
        child = subprocess.Popen([sys.executable, "-c", WRITES, tmp_path, str(first)], cwd=ROOT, stdout=subprocess.PIPE)
        with child:
            child.stdout.readline()
            time.sleep(0.05)
            child.kill()
        assert read_metrics(run)[-1]["step"] >= first + 100
        first = restored + 1
    with run.metrics.open("a") as torn:
        torn.write('[3]\nnull\n{"step": "a"}\n{"loss": 1.0}\n' + "[" * 100_000 + '\n{"step": 95, "lo')
    with MetricsWriter(run, after=90) as metrics:
        metrics.write(91, {"loss": 0.0})
    assert [row["step"] for row in read_metrics(run)] == list(range(92))
    assert read_metrics(run)[60] == {"step": 60, "loss": 1 / 61}


def test_run_that_begins_again_forgets_the_one_before(tmp_path):
    run = RunDirectory(tmp_path)
    for loss in (1.0, 2.0):
        with MetricsWriter(run) as metrics:
            metrics.write(0, {"loss": loss})
    assert read_metrics(run) == [{"step": 0, "loss": 2.0}]


def test_tensorboard_shows_the_same_numbers_and_hides_the_forgotten_steps(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run) as metrics:
        metrics.write(3, {"loss": 0.25, "cache": "hit", "resumed": True})
        metrics.image(3, "samples", np.zeros((8, 16, 3), np.uint8))
    with MetricsWriter(run, after=2) as metrics:
        metrics.write(3, {"loss": 0.125})
    events = board_events(run)
    values = [(event.step, value) for event in events for value in event.summary.value]
    assert [(s, v.tag, v.simple_value) for s, v in values if not v.image.width] == [
        (3, "loss", 0.25),
        (3, "loss", 0.125),
    ]
    assert [(s, v.tag, v.image.height, v.image.width) for s, v in values if v.image.width] == [(3, "samples", 8, 16)]
    starts = [event.step for event in events if event.session_log.status == event.session_log.START]
    assert starts == [0, 3], "TensorBoard drops what came before a start, from its step on"


# Long names fill metrics.jsonl first, many numbers the event file.
@pytest.mark.parametrize("values, file", [({"note": "x" * 100}, "metrics.jsonl"), ({"a": 1, "b": 2}, "tensorboard")])
def test_full_disk_is_one_line_and_the_whole_lines_stay(tmp_path, files_at_most, values, file):
    run = RunDirectory(tmp_path)
    line = f"{file}.*: File too large: free some space"
    with MetricsWriter(run) as metrics, files_at_most(1000), pytest.raises(ValueError, match=line) as error:
        for step in range(1000):
            metrics.write(step, values)
    assert "\n" not in str(error.value)
    assert [row["step"] for row in read_metrics(run)] == list(range(len(read_metrics(run))))
    assert len(read_metrics(run)) > 3
