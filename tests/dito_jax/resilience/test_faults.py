"""Fault injection: each fault has its documented effect, once per run unless it has an exclamation mark."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dito_jax.errors import UserError
from dito_jax.resilience.faults import KINDS, Fault, Faults, FaultsConfig
from dito_jax.telemetry.run_directory import RunDirectory


ROOT = Path(__file__).parents[3]
ROWS = {"image": np.ones((2, 4, 4, 1), np.float32), "label": np.zeros(2, np.int32)}


def faults(path, *inject, process=0):
    return Faults(FaultsConfig(inject), RunDirectory(path), process=process)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kil@3", "did you mean kill"),
        ("kill", "wanted kind@step"),
        ("kill@x", "wanted kind@step"),
        ("kill@3#", "wanted kind@step"),
        ("zzz@3", "choose from kill"),
    ],
)
def test_a_fault_that_is_none_is_one_line(text, words):
    with pytest.raises(UserError, match=words) as error:
        Fault.parsed(text)
    assert "\n" not in str(error.value)


def test_a_fault_is_parsed():
    assert Fault.parsed("slow-rank@30#2!:1.5") == Fault("slow-rank@30#2!:1.5", "slow-rank", 30, 2, True, 1.5)
    assert Fault.parsed("kill@7") == Fault("kill@7", "kill", 7, 0, False, None)
    assert {Fault.parsed(f"{kind}@1").kind for kind in KINDS} == set(KINDS)


STEPS = """
import sys
from dito_jax.resilience.faults import Faults, FaultsConfig
from dito_jax.telemetry.run_directory import RunDirectory
faults = Faults(FaultsConfig(tuple(sys.argv[2:])), RunDirectory(sys.argv[1]), process=0)
faults.begin()
for step in range(1, 6):
    faults.before_step(step)
    print(step, flush=True)
"""


def steps(path, *inject, worker="0") -> tuple[str, int]:
    """The steps that a process came through, and how it ended; SIGCONT ends a frozen one, by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS, path, *inject], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"DITO_WORKER": worker},
    )  # fmt: skip
    if inject[0].startswith(("freeze", "hang")):
        wanted = "T" if inject[0].startswith("freeze") else "S"
        said = [process.stdout.readline() for _ in range(2)]
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != wanted:
            pass
        assert process.poll() is None
        process.kill()
        return "".join([*said, process.communicate()[0]]).replace("\n", ""), process.wait()
    out = process.communicate(timeout=60)[0]
    return out.replace("\n", ""), process.returncode


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("crash", 1), ("freeze", -9), ("hang", -9)],
)
def test_what_stops_a_process_does_so_once(tmp_path, kind, code):
    assert steps(tmp_path, f"{kind}@3") == ("12", code)
    assert steps(tmp_path, f"{kind}@3", "kill@9") == ("12345", 0) if kind not in ("freeze", "hang") else True


def test_with_an_exclamation_mark_it_does_so_at_every_start(tmp_path):
    assert [steps(tmp_path, "kill@3!") for _ in range(2)] == [("12", -9)] * 2


def test_a_dead_worker_is_killed_at_every_start_and_others_are_not(tmp_path):
    assert steps(tmp_path, "dead@3#2", worker="2") == ("12", -9)
    assert steps(tmp_path, "dead@3#2", worker="2") == ("", -9)
    assert steps(tmp_path, "dead@3#2", worker="1") == ("12345", 0)


def test_a_slow_process_is_slow_from_then_on(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    injected = faults(tmp_path, "slow-rank@3:0.25", "slow-rank@4")
    for step in range(1, 5):
        injected.before_step(step)
    assert slept == [0.25, 0.25, 0.5]


def test_a_fault_is_injected_only_into_its_process(tmp_path):
    other = faults(tmp_path, "crash@1#1", "nan-grad@1#1", process=0)
    other.before_step(1)
    assert other.poisoned(1, ROWS) is ROWS
    with pytest.raises(RuntimeError, match="crash@1#1"):
        faults(tmp_path, "crash@1#1", process=1).before_step(1)


def test_poison_is_in_the_images_of_its_step_once_and_again_when_the_step_is(tmp_path):
    injected = faults(tmp_path, "nan-grad@2", "spike@3:7", "transient-nan@4")
    assert injected.poisoned(1, ROWS) is ROWS
    for _ in range(2):
        assert np.isnan(injected.poisoned(2, ROWS)["image"]).all()
    assert (injected.poisoned(3, ROWS)["image"] == 7).all() and injected.poisoned(3, ROWS)["label"] is ROWS["label"]
    assert np.isnan(injected.poisoned(4, ROWS)["image"]).all()
    assert (injected.poisoned(4, ROWS)["image"] == 1).all(), "run again, it is whole"
    assert injected.poisoned(2, ROWS) is ROWS, "not when the run comes to the step another time"
    assert faults(tmp_path, "nan-grad@2").poisoned(2, ROWS) is ROWS, "nor when it is started again"
    assert ROWS["image"].max() == 1 and ROWS["image"].dtype == np.float32


@pytest.mark.parametrize("kind", ["bitflip", "truncate", "delete"])
def test_the_largest_file_of_a_checkpoint_is_damaged(tmp_path, kind):
    folder = tmp_path / "checkpoints/4"
    folder.mkdir(parents=True)
    (folder / "large").write_bytes(bytes(100))
    (folder / "small").write_bytes(bytes(10))
    injected = faults(tmp_path, f"{kind}-ckpt@4")
    injected.after_save(3, folder)
    assert (folder / "large").read_bytes() == bytes(100)
    injected.after_save(4, folder)
    assert (folder / "small").read_bytes() == bytes(10)
    if kind == "delete":
        assert not (folder / "large").exists()
    else:
        content = (folder / "large").read_bytes()
        assert len(content) == (50 if kind == "truncate" else 100)
        assert sum(byte.bit_count() for byte in content) == (1 if kind == "bitflip" else 0)


FULL = """
import sys
from pathlib import Path
from dito_jax.resilience.faults import Faults, FaultsConfig
from dito_jax.telemetry.run_directory import RunDirectory
faults = Faults(FaultsConfig(("disk-full@2",)), RunDirectory(sys.argv[1]), process=0)
for step in (1, 2):
    faults.before_save(step)
    try:
        Path(sys.argv[1], str(step)).write_bytes(bytes(5000))
    except OSError as error:
        print(step, error.strerror)
"""


def test_on_a_full_disk_nothing_large_is_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("2 File too large\n", 0)
