"""Each fault strikes where and when it was told to, and once a run."""

import errno
import signal
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.errors import UserError
from dito_jax.training.faults import KINDS, Fault, Faults, FaultsConfig, largest_data_file, parse
from dito_jax.training.run_directory import RunDirectory, json_lines


# A run of ten steps that says which it comes to.
RUN = """
import sys, time
from dito_jax.training.faults import Faults, FaultsConfig
from dito_jax.training.run_directory import RunDirectory
faults = Faults(FaultsConfig(tuple(sys.argv[2:])), RunDirectory(sys.argv[1]), process=0)
faults.begin()
for step in range(1, 11):
    faults.before_step(step)
    print(step, flush=True)
"""
WHOLE = "".join(f"{step}\n" for step in range(1, 11))


@pytest.fixture
def faults(tmp_path):
    """`faults("kill@3", process=1)`: those of a new start of one run."""

    def start(*specs: str, process: int = 0) -> Faults:
        return Faults(FaultsConfig(specs), RunDirectory(tmp_path), process=process)

    return start


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("kill@120", ("kill", 120, 0, False, 0.0)),
        ("hang@50#1", ("hang", 50, 1, False, 0.0)),
        ("spike@7!:3.5", ("spike", 7, 0, True, 3.5)),
        ("slow-rank@7#2", ("slow-rank", 7, 2, False, 0.5)),
        ("spike@0", ("spike", 0, 0, False, 100.0)),
    ],
)
def test_a_fault_is_read_as_written(spec, fault):
    assert parse(spec) == Fault(spec, *fault)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kil@120", "no kind kil; did you mean kill"),
        ("explode@120", "choose from: kill, term"),
        ("kill", "wanted kind@step"),
        ("kill@-3", "wanted kind@step"),
        ("kill@3:5", "kill takes no value"),
        ("spike@3:1.2.3", "1.2.3 is no number"),
    ],
)
def test_a_wrong_one_is_one_line(spec, said, faults):
    with pytest.raises(UserError, match=said) as error:
        faults(spec)
    assert "\n" not in str(error.value) and spec in str(error.value)


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_what_ends_a_run_does_so_once(kind, number, tmp_path, start, finish):
    (run,) = start(RUN, tmp_path, f"{kind}@4")
    out, err = finish(run, -number)
    assert out == "1\n2\n3\n" and err == f"drill: {kind}@4: {KINDS[kind]}.\n"
    (run,) = start(RUN, tmp_path, f"{kind}@4")
    assert finish(run, 0) == (WHOLE, "")
    assert [row["fault"] for row in json_lines(tmp_path / "faults.jsonl")] == [f"{kind}@4"]


def test_or_at_every_start(tmp_path, start, finish):
    for _ in range(2):
        (run,) = start(RUN, tmp_path, "kill@4!")
        assert finish(run, -signal.SIGKILL)[0] == "1\n2\n3\n"


@pytest.mark.parametrize(("kind", "state"), [("hang", "S"), ("freeze", "T")])
def test_what_stands_still(kind, state, tmp_path, start, finish):
    (run,) = start(RUN, tmp_path, f"{kind}@4")
    assert [run.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
    assert run.stderr.readline().startswith(f"drill: {kind}@4")
    time.sleep(0.5)
    stat = Path(f"/proc/{run.pid}/stat").read_text()
    assert stat.rpartition(")")[2].split()[0] == state and run.poll() is None
    run.kill()
    assert finish(run, -signal.SIGKILL)[0] == ""


def test_the_dead_stay_dead_in_their_place(tmp_path, start, finish):
    dead = ("dead@4#3",)
    (run,) = start(RUN, tmp_path, *dead, DITO_PLACE="3")
    assert finish(run, -signal.SIGKILL)[0] == "1\n2\n3\n"
    (run,) = start(RUN, tmp_path, *dead, DITO_PLACE="3")
    assert finish(run, -signal.SIGKILL)[0] == "", "at once, at a later start"
    for elsewhere in ({"DITO_PLACE": "0"}, {}):
        (run,) = start(RUN, tmp_path, *dead, **elsewhere)
        assert finish(run, 0)[0] == WHOLE


def test_a_crash_is_an_error_once(faults):
    first = faults("crash@4")
    first.before_step(3)
    with pytest.raises(RuntimeError, match="crash@4"):
        first.before_step(4)
    faults("crash@4").before_step(4)
    faults("crash@5#1").before_step(5)
    with pytest.raises(RuntimeError):
        faults("crash@5#1", process=1).before_step(5)


def test_a_slow_rank_is_slow_from_a_step_on(faults, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    slow = faults("slow-rank@4:0.25")
    for step in range(1, 7):
        slow.before_step(step)
    assert slept == [0.25] * 3


@pytest.mark.parametrize(("spec", "again"), [("nan-grad@4", True), ("transient-nan@4", False)])
def test_images_become_nan_and_again_or_not(spec, again, faults):
    images = np.ones((2, 4, 4, 1), np.float32)
    first = faults(spec)
    assert first.poisoned(3, images) is images
    poisoned = first.poisoned(4, images)
    assert np.isnan(poisoned).all() and poisoned.dtype == np.float32 and (images == 1).all()
    assert np.isnan(first.poisoned(4, images)).all() == again
    assert faults(spec).poisoned(4, images) is images, "a later start of the same run"


def test_a_spike_multiplies(faults):
    images = np.full((2, 4, 4, 1), 0.5, np.float32)
    assert (faults("spike@4").poisoned(4, images) == 50).all()
    assert (faults("spike@5!:3").poisoned(5, images) == 1.5).all()


def test_a_full_disk_is_full_while_it_saves(faults, tmp_path):
    full = faults("disk-full@4:1000")
    with full.saving(3):
        (tmp_path / "a").write_bytes(bytes(2000))
    with pytest.raises(OSError) as error, full.saving(4):
        (tmp_path / "b").write_bytes(bytes(2000))
    assert error.value.errno == errno.EFBIG
    (tmp_path / "c").write_bytes(bytes(2000))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as Orbax writes it, and its files by name."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(tmp_path / "4"), {"params": jnp.arange(5000.0), "step": jnp.zeros(())})
    return tmp_path / "4", lambda: {p: p.read_bytes() for p in (tmp_path / "4").rglob("*") if p.is_file()}


def changed(before: dict, after: dict) -> list:
    return [path for path in before if before[path] != after.get(path)]


def test_one_bit_is_flipped_by_the_seed_of_the_step(checkpoint, faults):
    path, files = checkpoint
    before = files()
    flips = faults("bitflip-ckpt@4")
    flips.after_save(3, path)
    assert files() == before
    flips.after_save(4, path)
    (file,) = changed(before, files())
    difference = int.from_bytes(before[file]) ^ int.from_bytes(file.read_bytes())
    assert difference.bit_count() == 1 and len(before[file]) >= 4000
    faults("bitflip-ckpt@4!").after_save(4, path)
    assert files() == before, "the same bit, flipped back"


@pytest.mark.parametrize("kind", ["truncate-ckpt", "delete-ckpt"])
def test_a_file_is_cut_or_deleted(kind, checkpoint, faults):
    path, files = checkpoint
    before, largest = files(), largest_data_file(path)
    faults(f"{kind}@4").after_save(4, path)
    assert changed(before, files()) == [largest]
    assert not largest.exists() if kind == "delete-ckpt" else 2 * largest.stat().st_size <= len(before[largest])


def test_without_faults_nothing_is_touched(faults, tmp_path):
    none, images = faults(), np.ones(3)
    none.begin()
    none.before_step(1)
    assert none.poisoned(1, images) is images
    with none.saving(1):
        none.after_save(1, tmp_path / "there is none")
    assert not list(tmp_path.iterdir())
