"""The supervisor: restarts, lost workers and giving up, with scripts in place of train.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dito_jax.errors import UserError
from dito_jax.resilience.supervisor import Patience, Supervisor
from dito_jax.resilience.workers import Worker, make_workers
from dito_jax.telemetry.events import read_events
from dito_jax.telemetry.run_directory import RunDirectory


ROOT = Path(__file__).parents[3]
QUICK = Patience(grace=0.5, pause=0.05, longest_pause=0.15)

# Does what the table says for its attempt and worker: beats at a step, then ends by a code or a signal, or stays.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from dito_jax.telemetry.heartbeat import Heartbeat
run, table = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
attempt, worker = os.environ["DITO_ATTEMPT"], os.environ["DITO_WORKER"]
process = os.environ.get("JAX_PROCESS_ID", "0")
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
with (run / "seen.jsonl").open("a") as file:
    file.write(json.dumps([int(attempt), int(worker), sys.argv[3:], [os.environ.get(n) for n in names]]) + "\\n")
what = table.get(f"{attempt}.{worker}") or table.get(attempt) or table["else"]
signals = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, _: signals.append(n))
heart = Heartbeat(run / "heartbeats" / process)
if "step" in what:
    heart.beat(what["step"], "step")
print(f"worker {worker} was here")
time.sleep(what.get("after", 0))
while "asked" in what and len(signals) < what["asked"]:
    time.sleep(0.01)
if signals:
    print("signals", *signals)
if what.get("stays"):
    time.sleep(60)
code = what["code"]
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def supervisor(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (tmp_path / "trainer.py").write_text(TRAINER)

    def make(table, num=1, shrink=None, patience=QUICK, **options):
        (tmp_path / "table.json").write_text(json.dumps(table))
        command = [sys.executable, str(tmp_path / "trainer.py"), str(run.path), str(tmp_path / "table.json")]
        where = options.pop("where", [Worker(slot) for slot in range(num)])
        os.environ["PYTHONPATH"] = str(ROOT)
        made = Supervisor(command, run, where, shrink or (lambda left: (left, [])), patience=patience, **options)
        made.run = run
        return made

    yield make
    os.environ.pop("PYTHONPATH", None)


def seen(supervisor) -> list[list]:
    """[attempt, worker, added options, [address, processes, process]] of each start."""
    return [json.loads(line) for line in (supervisor.run.path / "seen.jsonl").read_text().splitlines()]


def attempts(supervisor) -> int:
    return max(row[0] for row in seen(supervisor))


def told(supervisor, *kinds) -> list[str]:
    return [row["said"] for row in read_events(supervisor.run, *kinds)]


def test_a_run_that_is_done_is_done(supervisor):
    made = supervisor({"else": {"code": 0}})
    assert made.supervise() == 0
    assert seen(made) == [[1, 0, [], [None, None, None]]], "one process needs no other"


def test_the_users_mistake_is_not_tried_again(supervisor):
    made = supervisor({"else": {"code": 2}})
    assert (made.supervise(), attempts(made), told(made)) == (2, 1, [])


@pytest.mark.parametrize("code", [1, 86, -9, -11])
def test_what_ends_before_its_time_starts_again(supervisor, code):
    made = supervisor({"1": {"step": 5, "code": code}, "2": {"step": 9, "code": code}, "else": {"code": 0}})
    assert (made.supervise(), attempts(made)) == (0, 3)
    words = {1: "exit code 1", 86: "exit code 86", -9: "SIGKILL", -11: "SIGSEGV"}[code]
    assert told(made, "restart") == [
        f"supervisor: process 0 (worker 0) ended at step {step} by {words}; restarting in 0.05 s." for step in (5, 9)
    ]


def test_pauses_double_up_to_a_limit_and_begin_again_after_progress(supervisor):
    steps = [5, 5, 3, 2, 6, 0]
    table = {str(number): {"step": step, "code": 1} for number, step in enumerate(steps, start=1)}
    made = supervisor(table | {"else": {"code": 0}})
    assert made.supervise() == 0
    assert [said.split(" in ")[-1] for said in told(made, "restart")] == [
        "0.05 s.", "0.1 s.", "0.15 s.", "0.15 s.", "0.05 s.", "0.1 s.",
    ]  # fmt: skip


def test_preempted_alone_it_goes_on_at_once_however_often(supervisor):
    table = {str(number): {"step": 5, "code": 75} for number in range(1, 6)}
    made = supervisor(table | {"else": {"code": 0}}, patience=Patience(pause=60.0))
    assert (made.supervise(), attempts(made)) == (0, 6)


@pytest.mark.parametrize(("code", "returned"), [(1, 1), (86, 86), (-9, 137)])
def test_it_gives_up_when_no_start_gets_beyond_a_step(supervisor, code, returned):
    made = supervisor({"1": {"step": 3, "code": 1}, "else": {"step": 7, "code": code}})
    assert (made.supervise(), attempts(made)) == (returned, 4)
    (said,) = told(made, "gave_up")
    assert "ended at step 7" in said and "failure 3 in a row at this step" in said and str(made.run.supervision) in said


def test_a_beat_of_an_earlier_attempt_is_not_taken_for_the_last(supervisor):
    """Attempts 2 and 3 die before their first beat: at step 0, not at step 7 again."""
    made = supervisor({"1": {"step": 7, "code": 1}, "2": {"step": 8, "code": 1}, "else": {"code": 0}})
    began = time.time()
    (made.run.heartbeats).mkdir()
    assert made._beat(0, began).step == 0
    assert made.supervise() == 0
    assert made._beat(0, time.time()).step == 0 and made._beat(0, began).step == 0


def test_when_one_fails_the_others_have_their_grace_and_then_all_start_again(supervisor):
    table = {
        "1.0": {"step": 4, "stays": True, "code": 0},
        "1.1": {"step": 4, "code": 1, "after": 0.3},
        "1.2": {"step": 4, "code": 3, "after": 0.5},
        "else": {"code": 0},
    }
    made = supervisor(table, num=3)
    began = time.monotonic()
    assert made.supervise() == 0
    assert 0.8 < time.monotonic() - began < 20
    assert [row[:2] for row in sorted(seen(made))] == [[a, p] for a in (1, 2) for p in (0, 1, 2)]
    assert "process 1 (worker 1) ended at step 4 by exit code 1" in told(made, "restart")[0]
    of_first = [row[3] for row in seen(made) if row[0] == 1]
    assert {row[1] for row in of_first} == {"3"} and {row[2] for row in of_first} == {"0", "1", "2"}
    (address,) = {row[0] for row in of_first}
    assert address.startswith("127.0.0.1:")
    assert address not in {row[3][0] for row in seen(made) if row[0] == 2}


def test_a_process_that_is_done_waits_for_the_others(supervisor):
    made = supervisor({"1.0": {"code": 0}, "else": {"code": 0, "after": 1.0}}, num=2)
    assert (made.supervise(), attempts(made)) == (0, 1)


def test_of_processes_that_hang_the_one_behind_is_to_blame(supervisor):
    table = {"1.0": {"step": 52, "code": 86}, "1.1": {"step": 50, "code": 86, "after": 0.2}, "else": {"code": 0}}
    made = supervisor(table, num=2)
    assert made.supervise() == 0
    assert "process 1 (worker 1) ended at step 50 by exit code 86" in told(made, "restart")[0]


def test_after_losing_a_worker_the_run_continues_with_the_others(supervisor):
    table = {
        "1": {"step": 9, "stays": True, "code": 0}, "2": {"step": 5, "stays": True, "code": 0},
        "1.1": {"step": 9, "code": -9}, "2.1": {"code": -9}, "else": {"code": 0},
    }  # fmt: skip
    made = supervisor(table, num=4, shrink=lambda left: (2, ["--mesh.data", "2"]))
    assert made.supervise() == 0
    assert sorted(row[:3] for row in seen(made) if row[0] == 3) == [
        [3, 0, ["--mesh.data", "2"]], [3, 2, ["--mesh.data", "2"]]
    ]  # fmt: skip
    assert {row[3][1] for row in seen(made) if row[0] == 3} == {"2"}
    assert told(made, "worker_lost") == [
        "supervisor: worker 1 is lost: continuing with 2 of 4 processes, 1 idle (--mesh.data 2)."
    ]


def test_a_worker_that_made_progress_is_not_lost(supervisor):
    table = {"1.1": {"step": 5, "code": 1}, "2.1": {"step": 6, "code": 1}, "else": {"code": 0}}
    made = supervisor(table, num=2)
    assert made.supervise() == 0 and not told(made, "worker_lost") and {row[3][1] for row in seen(made)} == {"2"}


def test_where_the_mesh_cannot_shrink_it_says_so(supervisor):
    def shrink(left):
        raise UserError(f"{left} are too few")

    made = supervisor({"1.1": {"code": 1}, "2.1": {"code": 1}, "else": {"code": 0, "after": 0.2}}, num=2, shrink=shrink)
    with pytest.raises(UserError, match="1 are too few"):
        made.supervise()


SUPERVISES = """
import sys
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.resilience.supervisor import Patience, Supervisor
from dito_jax.resilience.workers import Worker
run, num, pause, *command = sys.argv[1:]
make_workers = [Worker(slot) for slot in range(int(num))]
patience = Patience(grace=5, pause=float(pause))
sys.exit(Supervisor(command, RunDirectory(run), make_workers, lambda left: (left, []), patience=patience).supervise())
"""


def as_a_process(supervisor, table, num, pause) -> subprocess.Popen:
    made = supervisor(table)
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISES, made.run.path, str(num), str(pause), *made._command],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_starts(tmp_path, num):
    deadline, file = time.monotonic() + 30, tmp_path / "run/supervise.log"
    while time.monotonic() < deadline and (not file.exists() or file.read_text().count("was here") < num):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_process_and_nothing_is_started_again(supervisor, tmp_path, number):
    process = as_a_process(supervisor, {"else": {"step": 5, "asked": 1, "code": 75}}, num=2, pause=0.01)
    wait_for_starts(tmp_path, 2)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and said.count(f"signals {int(number)}") == 2
    assert (tmp_path / "run/supervise.log").read_text().count("was here") == 2


def test_a_second_signal_is_passed_on_too(supervisor, tmp_path):
    process = as_a_process(supervisor, {"else": {"asked": 2, "code": -15}}, num=1, pause=0.01)
    wait_for_starts(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "signals 15 15" in process.communicate(timeout=30)[1]
    assert process.returncode == 128 + 15


def test_a_signal_during_a_pause_ends_it(supervisor, tmp_path):
    process = as_a_process(supervisor, {"else": {"step": 1, "code": 1}}, num=1, pause=300)
    lines = iter(process.stderr.readline, "")
    assert any("restarting in 300 s" in line for line in lines)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_all_that_is_said_is_in_one_log(supervisor, capfd):
    made = supervisor({"1.1": {"step": 3, "code": 1}, "else": {"code": 0}}, num=2)
    assert made.supervise() == 0
    lines = [line.split(" ", 2)[2] for line in made.run.supervision.read_text().splitlines()]
    assert sorted(lines) == sorted([
        "[process 0] worker 0 was here", "[process 1] worker 1 was here", *told(made, "restart"),
        "[process 0] worker 0 was here", "[process 1] worker 1 was here",
    ])  # fmt: skip
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(lines)


def test_hosts_are_reached_by_a_shell_that_is_given_everything(supervisor, tmp_path, monkeypatch):
    shell = tmp_path / "shell"
    shell.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/hosts\ncd /\nexec env -i PATH="$PATH" sh -c "$2"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("XLA_FLAGS", "--a 'b c' $HOME")
    monkeypatch.setenv("JAX_X", str(ROOT))
    where = make_workers(1, ["one", "me@two", "one"])
    made = supervisor({"else": {"code": 0}}, where=where, remote_shell=f"{shell}")

    made._command += ["it's", "$HOME"]
    assert made.supervise() == 0
    assert sorted((tmp_path / "hosts").read_text().split()) == ["me@two", "one", "one"]
    assert sorted(row[1] for row in seen(made)) == [0, 1, 2]
    assert {tuple(row[2]) for row in seen(made)} == {("it's", "$HOME")}
    assert {row[3][0].split(":")[0] for row in seen(made)} == {"one"}


def test_workers_are_counted_or_named():
    assert make_workers(2, []) == [Worker(0), Worker(1)]
    assert make_workers(1, ["a", "b"]) == [Worker(0, "a"), Worker(1, "b")]
    for processes, hosts in ((0, []), (2, ["a"])):
        with pytest.raises(UserError, match="--processes"):
            make_workers(processes, hosts)
