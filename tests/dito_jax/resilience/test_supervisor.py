"""The supervisor: restarts, lost workers and giving up, with scripts in place of train.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dito_jax.errors import UserError
from dito_jax.resilience.launcher import MARK
from dito_jax.resilience.supervisor import Patience, Supervisor
from dito_jax.resilience.workers import LAUNCHER, Worker, forwarded, make_workers
from dito_jax.telemetry.events import read_events
from dito_jax.telemetry.run_directory import RunDirectory


ROOT = Path(__file__).parents[3]
QUICK = Patience(grace=0.5, pause=0.05, longest_pause=0.15)

# Does what the table says for its attempt and worker: beats at a step, then ends by a code or a signal, or stays.
TRAINER = """
import json, os, signal, sys, threading, time
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
if what.get("ticks"):
    threading.Thread(target=lambda: [(heart.alive(), time.sleep(0.05)) for _ in range(1000)], daemon=True).start()
print(f"worker {worker} was here")
time.sleep(what.get("after", 0))
while "asked" in what and len(signals) < what["asked"]:
    time.sleep(0.01)
if signals:
    print("signals", *signals)
    (run / f"signals-{worker}").write_text(" ".join(map(str, signals)))
if what.get("freezes"):
    os.kill(os.getpid(), signal.SIGSTOP)
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
run, num, pause, host, shell, *command = sys.argv[1:]
workers = [Worker(slot, host or None) for slot in range(int(num))]
patience = Patience(grace=5, pause=float(pause))
made = Supervisor(command, RunDirectory(run), workers, lambda left: (left, []), patience=patience, remote_shell=shell)
sys.exit(made.supervise())
"""


def as_a_process(supervisor, table, num, pause, host=None, shell: str | Path = "ssh") -> subprocess.Popen:
    made = supervisor(table)
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISES, made.run.path, str(num), str(pause), host or "", shell, *made._command],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_starts(tmp_path, num):
    deadline, file = time.monotonic() + 30, tmp_path / "run/supervise.log"
    while time.monotonic() < deadline and (not file.exists() or file.read_text().count("was here") < num):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_every_process_and_nothing_is_started_again(supervisor, tmp_path, number):
    """SIGHUP, which would end a process without a save, arrives as SIGTERM."""
    process = as_a_process(supervisor, {"else": {"step": 5, "asked": 1, "code": 75}}, num=2, pause=0.01)
    wait_for_starts(tmp_path, 2)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    arrives = signal.SIGTERM if number == signal.SIGHUP else number
    assert process.returncode == 75 and said.count(f"signals {int(arrives)}") == 2
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


def remote_shell(folder: Path) -> Path:
    """Like ssh: the command has its own session and environment, and no signal to the shell reaches it."""
    shell = folder / "shell"
    shell.write_text(
        f'#!/bin/sh\necho "$1" >> {folder}/hosts\ncd /\nexec setsid --wait env -i PATH="$PATH" sh -c "$2"\n'
    )
    shell.chmod(0o755)
    return shell


@pytest.mark.parametrize("host", [None, "far"])
def test_when_the_supervisor_is_killed_the_processes_are_asked_to_stop(supervisor, tmp_path, host):
    process = as_a_process(supervisor, {"else": {"asked": 1, "code": 75}}, 2, 0.01, host, remote_shell(tmp_path))
    wait_for_starts(tmp_path, 2)
    process.kill()
    process.communicate()
    deadline, files = time.monotonic() + 20, [tmp_path / f"run/signals-{worker}" for worker in (0, 1)]
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [file.read_text() for file in files] == ["15", "15"]


def test_a_signal_reaches_the_process_on_another_host(supervisor, tmp_path):
    process = as_a_process(supervisor, {"else": {"asked": 1, "code": 75}}, 1, 0.01, "far", remote_shell(tmp_path))
    wait_for_starts(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    assert "signals 15" in process.communicate(timeout=30)[1] and process.returncode == 75


@pytest.mark.parametrize("host", [None, "far"])
def test_a_frozen_process_is_the_cause_and_not_the_one_that_jax_ends(supervisor, tmp_path, host):
    frozen, ended = {"step": 9, "ticks": 1, "freezes": 1, "code": 0}, {"step": 9, "ticks": 1, "code": -6, "after": 1}
    table = {f"{attempt}.{worker}": (frozen, ended)[worker] for attempt in (1, 2) for worker in (0, 1)}
    made = supervisor(
        table | {"else": {"code": 0}}, shrink=lambda left: (left, []), patience=Patience(grace=1.0, pause=0.05),
        where=[Worker(0, host), Worker(1, host)], remote_shell=str(remote_shell(tmp_path)),
    )  # fmt: skip
    assert made.supervise() == 0
    assert "worker 0 is lost" in told(made, "worker_lost")[0] and seen(made)[-1][:2] == [3, 1]
    assert "ended at step 9 by SIGABRT; process 0 gave no sign of life" in told(made, "restart")[0]


def test_a_process_that_does_not_end_after_sigkill_is_given_up(supervisor):
    """As one in state D. Here it is the launcher that does not react."""
    script = '[ "$DITO_WORKER" = 0 ] || { sleep 0.5; exit 1; }; kill -STOP $PPID; exec sleep 60'
    made = supervisor({}, num=2, patience=Patience(grace=0.2, kill=0.3))
    made._command = ["sh", "-c", script]
    began = time.monotonic()
    assert made.supervise() == 86 and time.monotonic() - began < 20
    (said,) = told(made, "gave_up")
    assert "process 0 (worker 0) did not end within 0.3 s after SIGKILL" in said


def test_a_stop_signal_has_an_end(supervisor):
    made = supervisor({"else": {"step": 5, "asked": 9, "code": 75}}, patience=Patience(stop=0.5))
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert made.supervise() == 128 + 9


def test_a_remote_shell_without_standard_input_does_not_stop_the_command():
    command = [sys.executable, "-I", str(LAUNCHER), "sh", "-c", "sleep 0.3; printf done; exit 3"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    told, *rest = ended.stdout.split("\n")
    assert "passes no standard input" in told and rest == ["done", f"{MARK}exit 3", ""] and ended.returncode == 3


def test_hosts_are_reached_by_a_shell_that_is_given_everything(supervisor, tmp_path, monkeypatch):
    shell = remote_shell(tmp_path)
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


def test_only_what_is_listed_is_passed_to_other_hosts():
    allowed = {"DITO_SECRETS": "/s", "NCCL_DEBUG": "INFO", "XLA_FLAGS": "-x", "TF_CPP_MIN_LOG_LEVEL": "1"}
    secret = {
        "TF_API_TOKEN": "x", "TF_VAR_password": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "x",
        "HOME": "/", "GOOGLE_APPLICATION_CREDENTIALS": "x", "HF_TOKEN": "x", "WANDB_API_KEY": "x", "DITO_API_KEY": "x",
    }  # fmt: skip
    assert forwarded(allowed | secret) == allowed


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "me@-oProxyCommand=x", "", "me@", "a b", "a\n"])
def test_a_host_name_that_is_none_is_refused(host):
    with pytest.raises(UserError, match="wanted a host name"):
        make_workers(1, ["a", host])


def test_workers_are_counted_or_named():
    assert make_workers(2, []) == [Worker(0), Worker(1)]
    assert make_workers(1, ["a", "b"]) == [Worker(0, "a"), Worker(1, "b")]
    for processes, hosts in ((0, []), (2, ["a"])):
        with pytest.raises(UserError, match="--processes"):
            make_workers(processes, hosts)
