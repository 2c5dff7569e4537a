"""Checkpoints: bit-identical after restore on any mesh, and intact after the run is killed at any moment."""

import dataclasses
import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing.checkpoint import UNFINISHED, CheckpointError, Checkpoints, DamagedCheckpoint, digest
from dito_jax.checkpointing.retention import CheckpointConfig


pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
ROOT = Path(__file__).parents[3]


class Moments(NamedTuple):
    count: jax.Array
    mu: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict[str, dict[str, jax.Array]]
    optimizer: tuple
    ema: dict[str, jax.Array]
    key: jax.Array


def make_state(seed: int) -> State:
    """Numbers of NumPy's generator, so that processes that compile otherwise have the same bits."""
    rng = np.random.default_rng(seed)
    normal = lambda: jnp.asarray(rng.standard_normal((16, 8), np.float32))
    return State(
        params={"block": {"kernel": normal(), "bias": jnp.array([-0.0, jnp.nan])}},
        optimizer=(Moments(jnp.int32(seed), {"kernel": normal()}), ()),
        ema={"0.999": normal().astype(jnp.bfloat16)},
        key=jax.random.key_data(jax.random.key(seed)),
    )


BIG = {"x": jax.ShapeDtypeStruct((250_000,), jnp.uint32)}  # a million bytes that do not compress


def make_big() -> dict[str, jax.Array]:
    return {"x": jax.random.bits(jax.random.key(0), BIG["x"].shape, BIG["x"].dtype)}


def like(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding), state
    )


class HeldBack:
    """What is saved beside the state while it is in force: its writing lasts until `release` is set, or 20 s."""

    def __init__(self, monkeypatch=None):
        self.started, self.release = threading.Event(), threading.Event()
        save = ocp.save_checkpointables_async
        patched = lambda path, items, **options: save(path, {**items, "held": self}, **options)
        (setattr if monkeypatch is None else monkeypatch.setattr)(ocp, "save_checkpointables_async", patched)

    async def save(self, directory):
        async def background():
            await directory.await_creation()
            self.started.set()
            self.release.wait(20)

        return background()

    async def load(self, directory):
        raise NotImplementedError


def test_restored_state_goes_on_bit_for_bit(tmp_path):
    state = make_state(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state, metadata={"config": "digits"})
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(7, like(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for there, here in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        assert np.asarray(there).tobytes() == np.asarray(here).tobytes()
    metadata = Checkpoints(tmp_path).metadata(7)
    assert metadata["config"] == "digits" and abs(metadata["time"] - time.time()) < 600


def test_state_may_be_donated_while_it_is_written(tmp_path, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2000, 2000))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0).lower(x).compile()
    before, shape = digest({"x": x}), like({"x": x})
    checkpoints, held = Checkpoints(tmp_path), HeldBack(monkeypatch)
    checkpoints.save(1, {"x": x}, metadata={})
    for _ in range(3):
        x = overwrite(x)
    x.block_until_ready()
    assert checkpoints.latest() is None, "it was still being written"
    held.release.set()
    checkpoints.wait()
    assert checkpoints.latest() == 1
    assert digest(checkpoints.restore(1, shape)) == before


@pytest.mark.parametrize("saved, wanted", [((1, 1), (8, 1)), ((8, 1), (2, 2)), ((4, 2), (2, 4)), ((2, 4), (1, 1))])
def test_checkpoint_restores_onto_another_mesh(tmp_path, saved, wanted):
    def sharding(shape):
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        return jax.NamedSharding(jax.sharding.Mesh(devices, ("fsdp", "tensor")), jax.P("fsdp", "tensor"))

    state = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(state, sharding(saved)), metadata={})
    checkpoints.wait()
    restored = checkpoints.restore(1, like(state, sharding(wanted)))
    assert restored["kernel"].sharding.is_equivalent_to(sharding(wanted), 2)
    assert digest(restored) == digest(state)


def test_last_steps_stay_and_a_saved_step_is_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    for step in (9, 10, 11):
        checkpoints.save(step, make_state(step), metadata={})
    checkpoints.save(11, make_state(0), metadata={})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    assert digest(checkpoints.restore(11, like(make_state(11)))) == digest(make_state(11))


def test_a_step_that_is_being_deleted_has_its_name_no_more(tmp_path, monkeypatch):
    """A kill in the middle of it would leave half a step."""
    checkpoints, rmtree, deleted = Checkpoints(tmp_path, CheckpointConfig(keep=1)), shutil.rmtree, []

    def noted(path, *rest, **options):
        deleted.append((Path(path).name, checkpoints.steps()))
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), metadata={})
    checkpoints.close()
    assert deleted == [(f"1{UNFINISHED}", [2])]


def test_reading_changes_nothing_on_the_disk(tmp_path, monkeypatch):
    assert Checkpoints(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()
    writer = Checkpoints(tmp_path)
    writer.save(1, make_state(1), metadata={})
    writer.wait()
    held = HeldBack(monkeypatch)
    writer.save(2, make_state(2), metadata={})
    assert held.started.wait(20)
    (trace := tmp_path / f"2{UNFINISHED}" / "trace").touch()
    reader = Checkpoints(tmp_path)
    assert reader.latest() == 1
    reader.restore(1, like(make_state(1)))
    assert trace.exists()
    held.release.set()
    writer.close()
    assert digest(reader.restore(2, like(make_state(2)))) == digest(make_state(2))


SAVES = """
import sys
from tests.dito_jax.checkpointing import test_checkpoint as test
checkpoints = test.Checkpoints(sys.argv[1], test.CheckpointConfig(keep=2))
step = (checkpoints.latest() or 0) + 1
while True:
    checkpoints.wait()
    print(checkpoints.latest(), flush=True)
    checkpoints.save(step, test.make_state(step), metadata={})
    step += 1
"""


def run_until_killed(script: str, directory: Path, seconds: float) -> int | None:
    """Runs `script`, kills it -9 this long after its second line; returns the last step it said was saved."""
    child = subprocess.Popen([sys.executable, "-c", script, directory], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    begin = child.stdout.readline() + child.stdout.readline()
    time.sleep(seconds)
    child.kill()
    said = begin + child.communicate()[0]
    lines = [line for line in said.split("\n")[:-1] if line.isdecimal()]
    return int(lines[-1]) if lines else None


def test_killed_run_keeps_its_last_good_step(tmp_path):
    # Delays spread over several saves of some 50 ms each: writing, renaming, deleting.
    for trial, seconds in enumerate(random.Random(0).uniform(0, 0.4) for _ in range(4)):
        said = run_until_killed(SAVES, tmp_path, seconds)
        checkpoints = Checkpoints(tmp_path)
        assert said is not None and checkpoints.latest() >= said > trial
        for step in checkpoints.steps():
            restored = checkpoints.restore(step, like(make_state(step)))
            assert digest(restored) == digest(make_state(step))


STUCK = """
import sys
from tests.dito_jax.checkpointing import test_checkpoint as test
checkpoints = test.Checkpoints(sys.argv[1])
checkpoints.save(1, test.make_state(1), metadata={})
checkpoints.wait()
test.HeldBack()
checkpoints.save(2, test.make_state(2), metadata={})
print("saving", flush=True)
print("still saving", flush=True)
checkpoints.wait()
"""


def test_half_written_step_is_invisible_and_goes_with_the_next_save(tmp_path):
    run_until_killed(STUCK, tmp_path, 0.2)
    checkpoints = Checkpoints(tmp_path)
    assert list(tmp_path.glob(f"2{UNFINISHED}")), "the run was killed in the middle of a save"
    assert checkpoints.steps() == [1]
    assert digest(checkpoints.restore(1, like(make_state(1)))) == digest(make_state(1))
    checkpoints.save(3, make_state(3), metadata={})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


FAILS = """
import sys
from tests.dito_jax.checkpointing import test_checkpoint as test
state = test.make_state(1)
state.key.delete()
test.Checkpoints(sys.argv[1]).save(1, state, metadata={})
"""


def test_process_ends_when_its_save_fails(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", FAILS, tmp_path], cwd=ROOT, timeout=100, capture_output=True, text=True
    )
    assert "Array has been deleted" in child.stderr
    assert Checkpoints(tmp_path).latest() is None


@pytest.fixture
def collected():
    """Collects here the reads that Orbax dropped; pytest has undone the filter that says nothing of them."""
    yield
    gc.collect()


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_checkpoint_of_another_model_names_the_first_leaf_that_differs(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, make_state(1), metadata={})
    checkpoints.wait()
    wanted = like(make_state(1))

    wider = dataclasses.replace(wanted, params={"block": {**wanted.params["block"], "kernel": wanted.key}})
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(5, wider)
    assert "params/block/kernel is float32[16,8] in this checkpoint and uint32[2]" in one_line(error)

    with pytest.raises(CheckpointError, match=r"ema/0.9 is absent in this checkpoint and bfloat16\[16,8\]"):
        checkpoints.restore(5, dataclasses.replace(wanted, ema={"0.9": wanted.ema["0.999"]}))
    with pytest.raises(CheckpointError, match=r"ema/0.999 is bfloat16\[16,8\] in this checkpoint and absent"):
        checkpoints.restore(5, dataclasses.replace(wanted, ema={}))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; choose from: 5\."):
        checkpoints.restore(4, wanted)
    assert digest(checkpoints.restore(5, wanted)) == digest(make_state(1))


@pytest.mark.parametrize(
    ("file", "share", "words"),
    [
        ("state/_METADATA", 0.5, "its file state/_METADATA has"),
        ("state/manifest.ocdbt", 0, "its file state/manifest.ocdbt has 0 bytes, not"),
        ("state/ocdbt*/d/*", 0.5, "its file state/ocdbt.process_0/d/"),
        ("record/record.json", 0.5, "its checksum record cannot be read"),
    ],
)
@pytest.mark.usefixtures("collected")
def test_damaged_checkpoint_is_named_in_one_line(tmp_path, caplog, capfd, file, share, words):
    checkpoints, state = Checkpoints(tmp_path), {"large": make_big(), "small": make_state(1)}
    for step in (1, 2):
        checkpoints.save(step, state, metadata={})
    checkpoints.wait()
    for path in (tmp_path / "2").glob(file):
        os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DamagedCheckpoint, match=words) as error:
        checkpoints.restore(2, like(state))
    assert one_line(error).startswith(f"{tmp_path}/2: damaged (")
    assert "move it away to continue from step 1" in str(error.value)
    assert (caplog.text, *capfd.readouterr()) == ("", "", ""), "nothing is said but that line"
    checkpoints.restore(1, like(state))


def damage(step: Path, chance: random.Random) -> str:
    """Flips a bit of a file, cuts it short or deletes it, by chance; says what it did."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    file = chance.choice([chance.choice(files), max(files, key=lambda path: path.stat().st_size)])
    content = bytearray(file.read_bytes())
    what = chance.choice(("flip", "flip", "flip", "truncate", "delete")) if content else "delete"
    if what == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif what == "truncate":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        file.unlink()
    return f"{what} {file.relative_to(step)}"


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("known_sizes", [True, False], ids=["sizes known", "killed before sizes were recorded"])
def test_nothing_wrong_is_ever_loaded(tmp_path, known_sizes):
    """Fifty bits, cuts and deletions in all files: what is restored is right, of this step or the one before."""
    states = {step: {"big": make_big(), "state": make_state(step)} for step in (1, 2)}
    writer, chance, caught = Checkpoints(tmp_path / "good"), random.Random(0), []
    for step, state in states.items():
        writer.save(step, state, metadata={"step": step})
    writer.close()
    if not known_sizes:
        (tmp_path / "good/2/files.json").unlink()
    for trial in range(50 if known_sizes else 25):
        shutil.copytree(tmp_path / "good", bad := tmp_path / f"bad{trial}")
        done = damage(bad / "2", chance)
        checkpoints, damaged = Checkpoints(bad), []
        restored = checkpoints.restore_newest(like(states[1]), lambda step, error, to=damaged: to.append(error))
        assert restored is not None, done
        step, state = restored
        assert digest(state) == digest(states[step]) and checkpoints.metadata(step)["step"] == step, done
        assert (step == 1) == bool(damaged), done
        caught += [done] if damaged else []
        shutil.rmtree(bad)
    print(f"{len(caught)} of {trial + 1} showed: {caught}")
    assert len(caught) > trial / 2 and {"flip", "truncate", "delete"} == {what.split()[0] for what in caught}


def test_a_flipped_bit_in_the_values_is_told_from_fast_and_off(tmp_path):
    """Bits flipped inside the data, as they lie on the disk: only a full check sees them."""
    x = {"x": make_big()["x"]}
    (writer := Checkpoints(tmp_path)).save(1, x, metadata={})
    writer.close()
    data = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="checksum mismatch of x"):
        Checkpoints(tmp_path).restore(1, like(x))
    for verify in ("fast", "off"):
        wrong = Checkpoints(tmp_path, CheckpointConfig(verify=verify)).restore(1, like(x))
        assert digest(wrong) != digest(x)


def test_a_cut_file_is_told_by_its_size_before_it_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(verify="fast"))
    checkpoints.save(1, make_big(), metadata={})
    checkpoints.wait()
    data = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, 1000)
    with pytest.raises(DamagedCheckpoint, match=f"its file state/.*{data.name} has 1,000 bytes, not"):
        checkpoints.restore(1, like(make_big()))


def test_a_step_set_aside_is_kept_and_no_longer_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), metadata={})
    assert checkpoints.set_aside(2, "corrupt").name == "2.corrupt"
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2), metadata={})
    assert checkpoints.set_aside(2, "corrupt").name == "2.corrupt-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.corrupt", "2.corrupt-2"]


def test_when_no_step_is_good_nothing_is_loaded(tmp_path):
    checkpoints, heard = Checkpoints(tmp_path), []
    assert checkpoints.restore_newest(like(make_state(1)), lambda *_: None) is None
    for step in (1, 2):
        checkpoints.save(step, make_state(step), metadata={})
    checkpoints.wait()
    for step in (1, 2):
        (tmp_path / f"{step}/record/record.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path}/1: damaged .*use another --run-dir"):
        checkpoints.restore_newest(like(make_state(1)), lambda step, error: heard.append(step))
    assert heard == [2, 1]


def test_on_disk_is_called_once_a_step_is_written(tmp_path):
    seen = []
    checkpoints = Checkpoints(tmp_path, on_disk=lambda step, path: seen.append((step, path, path.is_dir())))
    checkpoints.save(4, make_state(4), metadata={})
    checkpoints.wait()
    assert seen == [(4, tmp_path / "4", True)]


@pytest.fixture
def synced(monkeypatch):
    """The paths of the files and directories that were put on disk (fsync)."""
    paths, sync = set(), os.fsync

    def fsync(descriptor):
        paths.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_a_new_step_would_survive_a_power_loss_before_the_old_one_goes(tmp_path, monkeypatch, synced):
    """All files, all directories, and the entry of the step in its directory; then the old step may be renamed."""
    checkpoints, unsynced, rename = Checkpoints(tmp_path, CheckpointConfig(keep=1)), [], Path.rename

    def renamed(path, target):
        if path == tmp_path / "1":
            step = [tmp_path, tmp_path / "2", *(tmp_path / "2").rglob("*")]
            unsynced.append({str(path) for path in step} - synced)
        return rename(path, target)

    checkpoints.save(1, make_state(1), metadata={})
    checkpoints.wait()
    synced.clear()
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoints.save(2, make_state(2), metadata={})
    checkpoints.close()
    assert unsynced == [set()] and checkpoints.steps() == [2]


def test_a_step_set_aside_stays_so_after_a_power_loss(tmp_path, synced):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), metadata={})
    checkpoints.wait()
    synced.clear()
    checkpoints.set_aside(1, "abandoned")
    assert synced == {str(tmp_path)}


@pytest.mark.parametrize("again", [False, True], ids=["", "Orbax makes it again"])
def test_a_directory_removed_while_a_step_is_written_is_one_line(tmp_path, monkeypatch, again):
    checkpoints, held = Checkpoints(tmp_path / "checkpoints"), HeldBack(monkeypatch)
    checkpoints.save(7, make_big(), metadata={})
    assert held.started.wait(20)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    if again:
        (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    held.release.set()
    with pytest.raises(CheckpointError) as error:
        checkpoints.close()
    assert "the files of the checkpoint of step 7 were removed or renamed while they were written" in one_line(error)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, four million bytes large."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4000000", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def leave_free(directory: Path, wanted: int) -> None:
    status = os.statvfs(directory)
    surplus = status.f_bavail - -(-wanted // status.f_bsize)
    (directory / "ballast").write_bytes(bytes(surplus * status.f_bsize))


# Room for half is noticed before writing. Room for the arrays, and none for what describes them: by the disk.
@pytest.mark.parametrize("room, noticed", [(500_000, "not enough free space"), (1_000_000, "No space left on device")])
def test_full_disk_is_one_line_and_the_last_step_stays(small_disk, caplog, capfd, room, noticed):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, make_big(), metadata={})
    checkpoints.wait()
    leave_free(small_disk, room)
    with pytest.raises(CheckpointError, match=noticed) as error:
        checkpoints.save(2, make_big(), metadata={})
        checkpoints.wait()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    assert f"needs 1,000,000 bytes, {free:,} are free; " in one_line(error)
    assert "step 1 is intact" in str(error.value)
    assert (caplog.text, *capfd.readouterr()) == ("", "", ""), "nothing is said but that line"
    assert sorted(path.name for path in small_disk.iterdir()) == ["1", "ballast"]
    assert digest(checkpoints.restore(1, like(make_big()))) == digest(make_big())

    (small_disk / "ballast").unlink()
    checkpoints.save(2, make_big(), metadata={})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_directory_that_became_read_only_is_one_line_and_the_last_step_stays(small_disk, caplog, capfd):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, make_state(1), metadata={})
    checkpoints.wait()
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)
    remount("ro")
    with pytest.raises(CheckpointError, match="cannot write .* step 2 .Read-only file system") as error:
        checkpoints.save(2, make_state(2), metadata={})
        checkpoints.wait()
    assert "step 1 is intact" in one_line(error)
    assert (caplog.text, *capfd.readouterr()) == ("", "", ""), "nothing is said but that line"
    assert digest(checkpoints.restore(1, like(make_state(1)))) == digest(make_state(1))
    remount("rw")
    checkpoints.save(2, make_state(2), metadata={})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_write_refused_in_the_background_surfaces_at_the_next_save(tmp_path, files_at_most):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_big(), metadata={})
    checkpoints.wait()
    with (
        files_at_most(300_000),
        pytest.raises(CheckpointError, match="step 2 .File too large.*step 1 is intact"),
    ):
        checkpoints.save(2, make_big(), metadata={})
        checkpoints.save(3, make_big(), metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_digest_tells_path_dtype_shape_and_bits_apart_and_not_sharding():
    x = jnp.arange(8, dtype=jnp.float32)
    whole = digest({"x": x})
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    assert digest({"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))}) == whole
    assert digest({"x": np.asarray(x)}) == whole
    others = [
        {"y": x},
        {"x": x.view(jnp.int32)},
        {"x": x.reshape(2, 4)},
        {"x": x.at[0].set(-0.0)},
        {"x": {"x": x}},
    ]
    assert whole not in {digest(other) for other in others}
