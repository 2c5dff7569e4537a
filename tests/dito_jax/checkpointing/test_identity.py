"""Identity of checkpoints: one of another step or run is refused, whatever its directory is called."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from dito_jax.checkpointing import checksums
from dito_jax.checkpointing.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from dito_jax.checkpointing.checksums import FILES, RECORD
from dito_jax.checkpointing.identity import RUN, config_digest, keep, owner_of
from dito_jax.checkpointing.report import verified
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.telemetry.run_directory import FollowedDirectory, RunDirectory


CONFIG = json.dumps({"kind": "TrainConfig", "train": {"steps": 40, "seed": 0}, "mesh": {"data": 1}})
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step: int):
    return {"step": jnp.int32(step), "x": jnp.arange(8.0) + step}


LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING), state(0))


def trained(path, *steps: int, config: str = CONFIG) -> RunDirectory:
    """A run with checkpoints of these steps, as train.py makes it."""
    run = RunDirectory(path)
    owner = owner_of(run, config)
    keep(owner, run)
    checkpoints = Checkpoints(run.checkpoints, owner=owner)
    for step in steps:
        checkpoints.save(step, state(step), metadata={"config": config})
    checkpoints.close()
    return run


def opened(run: RunDirectory, told: list[str] | None = None, config: str | None = CONFIG, **settings) -> Checkpoints:
    """The checkpoints of a run, as it finds them when it starts again."""
    tell = [].append if told is None else told.append
    owner = owner_of(run, config, tell=tell)
    return Checkpoints(run.checkpoints, CheckpointConfig(**settings), owner=owner, tell=tell, on_change=tell)


def newest(checkpoints: Checkpoints) -> tuple[int, int]:
    """(step, step in the state) of what is restored; nothing may be called damaged."""

    def unheard(step, error):
        raise AssertionError(error)

    restored = checkpoints.restore_newest(LIKE, unheard)
    assert restored is not None
    return restored[0], int(restored[1]["step"])


def without_identity(step) -> None:
    """Rewrites a record as versions before it wrote it."""
    record = json.loads((step / RECORD).read_text())
    record = {name: value for name, value in record.items() if name not in ("identity", "sha256")}
    (step / RECORD).write_text(json.dumps(record | {"sha256": checksums._sha256(record)}))
    checksums.write_sizes(step)


def test_step_run_and_config_are_inside_of_what_the_checksum_covers(tmp_path):
    run = trained(tmp_path, 28)
    record = opened(run).record(28)
    kept = json.loads((tmp_path / RUN).read_text())["id"]
    assert record["identity"] == {"step": 28, "run": kept, "config": config_digest(CONFIG)}
    assert len(kept) == 32 and record["identity"]["config"] == config_digest(json.dumps(json.loads(CONFIG), indent=4))
    changed = record | {"identity": record["identity"] | {"step": 29}}
    (run.checkpoints / "28" / RECORD).write_text(json.dumps(changed))
    with pytest.raises(DamagedCheckpoint, match="its checksum record was changed"):
        opened(run).restore(28, LIKE)


@pytest.mark.parametrize("verify", ["full", "fast", "off"])
@pytest.mark.parametrize("made", ["renamed", "copied", "linked"])
def test_another_step_is_refused_under_any_name(tmp_path, made, verify):
    run = trained(tmp_path, 28, 35)
    there, false = run.checkpoints / "28", run.checkpoints / "50"
    {"renamed": there.rename, "copied": lambda to: shutil.copytree(there, to), "linked": false.symlink_to}[made](
        there if made == "linked" else false
    )
    checkpoints = opened(run, verify=verify)
    with pytest.raises(CheckpointError, match="/50: holds step 28, not step 50: rename it to 28") as error:
        newest(checkpoints)
    assert not isinstance(error.value, DamagedCheckpoint) and false.exists()
    assert dict(verified(checkpoints))[50] == str(error.value), "dito checkpoint verify says so, too"
    (false.unlink if made == "linked" else lambda: shutil.rmtree(false))()
    assert newest(checkpoints) == (35, 35)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Another seed: nothing but the id tells it from this run's."""
    run, other = trained(tmp_path / "a", 7, 14), trained(tmp_path / "b", 7, 14, 21)
    shutil.copytree(other.checkpoints / "21", run.checkpoints / "21")
    with pytest.raises(
        CheckpointError, match="/21: a checkpoint of run .{8}, and this is run .{8} .*move it away"
    ) as error:
        newest(opened(run))
    assert "\n" not in str(error.value) and (run.checkpoints / "21").is_dir()
    shutil.rmtree(run.checkpoints / "21")
    assert newest(opened(run)) == (14, 14)


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_run_copied_or_moved_as_a_whole_resumes(tmp_path, how):
    run, told = trained(tmp_path / "a", 7, 14), []
    how(run.path, tmp_path / "elsewhere" / "b")
    moved = RunDirectory(tmp_path / "elsewhere" / "b")
    assert newest(opened(moved, told)) == (14, 14) and not told
    trained(moved.path, 21)
    assert newest(opened(moved, told)) == (21, 21) and not told


def test_a_link_to_the_same_step_on_another_disk_is_that_step(tmp_path):
    run = trained(tmp_path / "a", 7, 14)
    shutil.move(run.checkpoints / "14", tmp_path / "14")
    (run.checkpoints / "14").symlink_to(tmp_path / "14")
    assert newest(opened(run)) == (14, 14)


def test_a_checkpoint_of_an_older_version_loads_and_one_line_says_so(tmp_path):
    run, told = trained(tmp_path, 7, 14), []
    without_identity(run.checkpoints / "14")
    assert newest(opened(run, told)) == (14, 14)
    line = "/14: of an older dito_jax, without the id of its run: taken as step 14 of this run."
    assert told == [f"{run.checkpoints}{line}"]
    (run.checkpoints / "14").rename(run.checkpoints / "50")
    with pytest.raises(CheckpointError, match="/50: holds step 14, not step 50"):
        newest(opened(run))


def test_a_run_of_an_older_version_gets_an_id_and_goes_on(tmp_path):
    run = trained(tmp_path, 7, 14)
    for step in (7, 14):
        without_identity(run.checkpoints / str(step))
    (tmp_path / RUN).unlink()
    assert newest(opened(run)) == (14, 14)
    trained(tmp_path, 21)
    told = []
    assert newest(opened(run, told)) == (21, 21) and not told
    assert opened(run).restore(14, LIKE)["step"] == 14


@pytest.mark.parametrize("content", [None, "", '{"id": "12', "[]", '{"id": 3}'])
def test_a_lost_or_torn_id_is_that_of_the_newest_checkpoint(tmp_path, content):
    run = trained(tmp_path, 7, 14)
    before, told = json.loads((tmp_path / RUN).read_text()), []
    (tmp_path / RUN).unlink() if content is None else (tmp_path / RUN).write_text(content)
    (run.checkpoints / "14" / RECORD).write_text("")
    owner = owner_of(run, CONFIG, tell=told.append)
    assert owner.run == before["id"] and len(told) == 1 and "missing or torn" in told[0]
    keep(owner, run)
    assert json.loads((tmp_path / RUN).read_text()) == before


def test_reading_makes_no_id(tmp_path):
    run = FollowedDirectory(tmp_path)
    assert owner_of(run).run is None and not list(tmp_path.iterdir())
    assert owner_of(RunDirectory(tmp_path)).run != owner_of(RunDirectory(tmp_path)).run, "they are random"


def test_a_changed_config_is_told_and_loads(tmp_path):
    run, told = trained(tmp_path, 7), []
    longer = json.loads(CONFIG)
    longer["train"]["steps"], longer["mesh"]["data"] = 60, 2
    assert newest(opened(run, told, json.dumps(longer))) == (7, 7)
    changed = "train.steps 40 -> 60, mesh.data 1 -> 2"
    assert told == [f"resumed with other options than {run.checkpoints}/7 was saved with: {changed}."]
    assert newest(opened(run, told, None)) == (7, 7) and len(told) == 1, "a reader compares no config"


def test_names_that_are_no_steps_are_left_alone(tmp_path):
    run = trained(tmp_path, 7)
    for name in ("047", "28.corrupt", "٣", "notes", "1e3"):
        (run.checkpoints / name).mkdir()
    assert opened(run).steps() == [7] and newest(opened(run)) == (7, 7)


def test_fast_verification_without_the_list_of_files_is_a_full_one(tmp_path):
    """Killed before the sizes were written: nothing else says whether the files are complete."""
    (writer := Checkpoints(tmp_path)).save(1, {"x": jax.random.bits(jax.random.key(0), (250_000,))}, metadata={})
    writer.close()
    data = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    like = {"x": jax.ShapeDtypeStruct((250_000,), jnp.uint32, sharding=SHARDING)}
    fast = Checkpoints(tmp_path, CheckpointConfig(verify="fast"))
    fast.restore(1, like)
    (tmp_path / "1" / FILES).unlink()
    with pytest.raises(DamagedCheckpoint, match="checksum mismatch of x"):
        fast.restore(1, like)
