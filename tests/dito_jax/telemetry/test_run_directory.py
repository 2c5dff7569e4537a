"""The run directory: a lock for one training process, and atomic writes."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dito_jax.telemetry.run_directory import RunDirectory


ROOT = Path(__file__).parents[3]
HOLDS = """
import sys
import time
from dito_jax.telemetry.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in the directory until its stdin closes."""
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert child.stdout.readline() == "held\n"
    with child:
        yield child
        child.kill()


def test_second_trainer_gets_one_line_naming_the_first(tmp_path, holder):
    with pytest.raises(ValueError) as error, RunDirectory(tmp_path).hold():
        pass
    expected = f"{tmp_path}: process {holder.pid} on {socket.gethostname()} is training in this directory: "
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_lock_goes_with_the_process_that_held_it(tmp_path, holder, end):
    holder.kill() if end == "killed" else holder.stdin.close()
    holder.wait()
    with RunDirectory(tmp_path).hold():
        second = subprocess.run(
            [sys.executable, "-c", HOLDS, tmp_path],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert second.returncode != 0, "and it keeps others out again"


def test_a_process_that_is_started_again_waits_for_the_lock(tmp_path, holder, monkeypatch):
    """The process of the start before may still be saving."""
    monkeypatch.setenv("DITO_ATTEMPT", "2")
    threading.Timer(0.5, holder.kill).start()
    with RunDirectory(tmp_path).hold():
        assert holder.poll() is not None or holder.wait(5) is not None


FORKS = """
import os, sys
from dito_jax.telemetry.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).hold():
    worker = os.fork()
    if worker == 0:
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_orphaned_worker_does_not_keep_the_lock(tmp_path):
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", FORKS, tmp_path], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    with child:
        assert child.stdout.readline() == "held\n"
        child.wait()
        with RunDirectory(tmp_path).hold():
            child.stdin.close()  # until here the worker lived


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, files_at_most):
    run = RunDirectory(tmp_path / "run")
    run.write_json("config.json", {"steps": 5})
    with files_at_most(1000), pytest.raises(ValueError, match=r"config\.json: File too large: free some space"):
        run.write_text("config.json", "x" * 100_000)
    assert json.loads(run.config.read_text()) == {"steps": 5}
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


REWRITES = """
import sys
import time
from dito_jax.telemetry.run_directory import RunDirectory
run, size = RunDirectory(sys.argv[1]), 0
while True:
    size += 1
    run.write_text("samples/report.md", str(size % 10) * 100_000)
    if size == 2:
        print("rewriting", flush=True)
"""


def test_reader_sees_a_whole_file_while_it_is_rewritten(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", REWRITES, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        child.stdout.readline()
        seen, reads, deadline = set(), 0, time.monotonic() + 60
        while (reads < 100 or len(seen) < 3) and time.monotonic() < deadline:  # as slow as the disk syncs
            reads += 1
            text = (RunDirectory(tmp_path).samples / "report.md").read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
            seen.add(text[0])
    finally:
        child.kill()
        child.communicate()
    assert len(seen) >= 3, "it was rewritten meanwhile"
