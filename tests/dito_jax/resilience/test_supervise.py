"""`dito supervise` and signals at unusual moments, with shell commands in place of train.py."""

import os
import signal
import sys

import jax
import pytest

from dito_jax.cli import main as cli
from dito_jax.errors import UserError
from dito_jax.resilience import attempt
from dito_jax.resilience.supervisor import Patience, Supervisor
from dito_jax.resilience.workers import Worker
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory
from kernels_pallas import backend


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def of_shell(run, script, num=1, shrink=lambda left: (left, []), **options) -> Supervisor:
    patience = Patience(grace=2.0, pause=0.01, longest_pause=0.02)
    workers = [Worker(slot) for slot in range(num)]
    return Supervisor(["sh", "-c", script], run, workers, shrink, patience=patience, **options)


@pytest.mark.parametrize("first", [1, 75, 86])
def test_the_users_mistake_counts_from_whichever_process_it_comes(run, first):
    script = f'if [ "$DITO_WORKER" = 0 ]; then exit {first}; fi; sleep 0.3; exit 2'
    assert of_shell(run, script, num=2).supervise() == 2
    assert not read_events(run, "restart")


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]])
def test_signals_that_come_while_processes_are_started_reach_each_once(run, monkeypatch, signals, attempts):
    start, ready = attempt._start, run.path.parent / "ready"

    def interrupted(command, worker, added, remote_shell):
        process = start(command, worker, added, remote_shell)
        if int(added["DITO_ATTEMPT"]) < attempts:
            return process
        while not (run.path.parent / f"ready{worker.slot}").exists():
            pass
        if worker.slot == 0:
            for number in signals:
                os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(attempt, "_start", interrupted)
    script = (
        f"[ $DITO_ATTEMPT -ge {attempts} ] || exit 1; "
        "n=0; trap 'n=$((n+1)); echo TERM' TERM; trap 'n=$((n+1)); echo USR1' USR1; "
        f"touch {ready}$DITO_WORKER; for i in $(seq 100); do sleep 0.05; [ $n -ge {len(signals)} ] && break; done; "
        "sleep 0.2; exit 75"
    )
    assert of_shell(run, script, num=2).supervise() == 75
    log = run.supervision.read_text()
    assert log.count("TERM") == 2 and log.count("USR1") == 2 * (len(signals) - 1)
    assert len(read_events(run, "restart")) == attempts - 1


def test_a_signal_between_two_starts_lets_none_follow(run, monkeypatch):
    wait = attempt.Attempt.wait

    def interrupted(self):
        ends = wait(self)
        monkeypatch.setattr(Supervisor, "_say", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        return ends

    monkeypatch.setattr(attempt.Attempt, "wait", interrupted)
    assert of_shell(run, "echo here; exit 75").supervise() == 75
    assert run.supervision.read_text().count("here") == 1


def test_a_remote_shell_that_is_not_there_is_one_line(run):
    made = Supervisor(["true"], run, [Worker(0, "a")], lambda left: (left, []), remote_shell="/nowhere/ssh")
    with pytest.raises(UserError, match="^/nowhere/ssh: No such file .* --remote-shell.$"):
        made.supervise()


def test_the_log_says_why_it_could_not_go_on_with_fewer(run):
    def shrink(left):
        raise UserError(f"{left} are too few.")

    with pytest.raises(UserError, match="1 are too few"):
        of_shell(run, '[ "$DITO_WORKER" = 0 ] || exit 3; sleep 1', num=2, shrink=shrink).supervise()
    last = run.supervision.read_text().splitlines()[-1]
    assert last.endswith("(worker 1) ended at step 0 by exit code 3; worker 1 is lost. 1 are too few.")


def test_the_verb_starts_no_device_and_goes_on_with_the_devices_that_processes_had(run, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the processes need the devices")

    monkeypatch.setattr(jax, "devices", forbidden)
    monkeypatch.setattr(backend, "settle_platform", forbidden)
    made = []
    monkeypatch.setattr(Supervisor, "supervise", lambda self: made.append(self) or 75)
    Events(run).record("start", step=0, processes=4, devices=8)
    words = "configs/digits.py --processes 4 --train.batch_size 96 --run-dir"
    monkeypatch.setattr(sys, "argv", ["dito", "supervise", *words.split(), str(run.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75
    (supervisor,) = made
    assert supervisor._shrink(3) == (3, ["--mesh.data", "6", "--train.gradient_accumulation_steps", "2"])
    assert supervisor._command[2:] == ["configs/digits.py", "--train.batch_size", "96", "--run-dir", str(run.path)]
