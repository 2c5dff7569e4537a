"""Failed reads: a request to stop, or an error of the file system, never makes a good checkpoint a damaged one."""

import errno
import os
import resource
import signal
import threading

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing import failures
from dito_jax.checkpointing.checkpoint import Checkpoints, DamagedCheckpoint, digest
from dito_jax.checkpointing.failures import UnreadableCheckpoint, causes, passing, stop_request
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.errors import Preempted
from dito_jax.resilience.preemption import Preemption


pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
STATE = {"x": jnp.arange(1000.0)}
LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)
TENSORSTORE = "UNKNOWN: Error opening 'zarr3' driver: Failed to read from file: d/0 [os_error_code='{}'] [source ...]"
PASSING = {
    **{errno.errorcode[code]: OSError(code, os.strerror(code)) for code in (
        errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EACCES,
    )},
    "MemoryError": MemoryError(),
    "tensorstore EIO": ValueError(TENSORSTORE.format(errno.EIO)),
    "tensorstore EMFILE": ValueError(TENSORSTORE.format(errno.EMFILE)),
    "no memory on a device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes."),
    "no thread": RuntimeError("can't start new thread"),
    "timeout": TimeoutError("no answer"),
}  # fmt: skip


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Two good steps."""
    monkeypatch.setattr(failures, "PAUSES", (0.0, 0.0, 0.0))
    writer = Checkpoints(tmp_path)
    for step in (1, 2):
        writer.save(step, {"x": STATE["x"] + step}, metadata={})
    writer.close()
    return tmp_path


@pytest.fixture
def fails(monkeypatch):
    """`fails(error, times)`: the next so many loads of Orbax raise `error`; returns a list of the loads."""

    def plant(error: BaseException, times: int) -> list[str]:
        load, loads = ocp.load, []

        def failing(path, *arguments, **options):
            loads.append(path)
            if len(loads) <= times:
                raise error
            return load(path, *arguments, **options)

        monkeypatch.setattr(ocp, "load", failing)
        return loads

    return plant


def restored(directory, told=None):
    """(step, state) of the newest good step; each damaged one is set aside, as a run does it."""
    checkpoints = Checkpoints(directory, tell=(told if told is not None else []).append)
    damaged: list[int] = []
    found = checkpoints.restore_newest(LIKE, lambda step, error: damaged.append(step))
    for step in damaged:
        checkpoints.set_aside(step, "corrupt")
    assert found is not None
    return found


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def wrapped(error):
    try:
        try:
            raise error
        except BaseException as stop:
            raise ValueError("the layout of the checkpoint is unknown") from stop
    except ValueError as library:
        return library


@pytest.mark.parametrize("stop", [Preempted("asked to stop"), KeyboardInterrupt(), SystemExit(75)], ids=repr)
@pytest.mark.parametrize("how", ["as it is", "wrapped by a library"])
def test_a_request_to_stop_passes_and_nothing_is_renamed(directory, fails, stop, how):
    fails(stop if how == "as it is" else wrapped(stop), 1)
    with pytest.raises(type(stop)) as error:
        restored(directory)
    assert error.value is stop and names(directory) == ["1", "2"]


@pytest.mark.parametrize("at", ["record", "arrays"])
def test_a_sigterm_while_a_checkpoint_is_read_stops_and_renames_nothing(directory, monkeypatch, at):
    """As train.py is stopped: by the handler of Preemption, in the main thread, in whatever it reads."""

    def killed_in(module, name):
        read = getattr(module, name)

        def reads(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return read(*arguments, **options)

        monkeypatch.setattr(module, name, reads)

    killed_in(*((failures.Path, "read_text") if at == "record" else (ocp, "load")))
    with pytest.raises(Preempted), Preemption(60):
        restored(directory)
    assert names(directory) == ["1", "2"]


def test_except_exception_of_a_library_does_not_see_the_stop():
    assert not issubclass(Preempted, Exception)


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_error_is_retried_and_renames_nothing(directory, fails, name):
    told = []
    loads = fails(PASSING[name], 3)
    step, state = restored(directory, told)
    assert step == 2 and digest(state) == digest({"x": STATE["x"] + 2})
    assert len(loads) == 4 and names(directory) == ["1", "2"]
    assert len(told) == 3 and all(f"{directory}/2: cannot be read (" in line and "\n" not in line for line in told)


@pytest.mark.parametrize("name", PASSING)
def test_an_error_that_does_not_pass_is_one_line_and_renames_nothing(directory, fails, name):
    loads = fails(PASSING[name], 99)
    with pytest.raises(
        UnreadableCheckpoint, match="/2: cannot be read .*left as it is: .*run the same command"
    ) as error:
        restored(directory)
    assert "\n" not in str(error.value) and not isinstance(error.value, DamagedCheckpoint)
    assert len(loads) == 4 and names(directory) == ["1", "2"]


@pytest.mark.parametrize("failing", ["record.json", "the list of steps"])
def test_an_error_of_the_file_system_outside_orbax_is_no_damage(directory, monkeypatch, failing):
    """Of the checksum record, and of the directory of the checkpoints."""
    left = [3]

    def sometimes(call):
        def called(path, *arguments, **options):
            if (path == directory if failing != "record.json" else path.name == failing) and left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return call(path, *arguments, **options)

        return called

    for name in ("read_text", "iterdir"):
        monkeypatch.setattr(failures.Path, name, sometimes(getattr(failures.Path, name)))
    assert restored(directory)[0] == 2 and names(directory) == ["1", "2"] and left == [0]


def test_with_too_many_open_files_it_waits_until_some_are_closed(directory, monkeypatch):
    """The table of files is full in truth: the limit of this process is the number that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(failures, "PAUSES", (0.2, 0.2, 0.2))
    jax.block_until_ready(restored(directory))  # what is imported and opened at the first use
    probe = os.open("/", os.O_RDONLY)
    os.close(probe)
    told = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    free = threading.Timer(0.3, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    free.start()
    try:
        step, state = restored(directory, told)
    finally:
        free.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert step == 2 and digest(state) == digest({"x": STATE["x"] + 2})
    assert told and "Too many open files" in told[0] and names(directory) == ["1", "2"]


def test_an_unknown_error_is_damage_if_the_files_can_be_read_and_it_comes_twice(directory, fails):
    fails(TypeError("no such layout"), 1)
    assert restored(directory)[0] == 2 and names(directory) == ["1", "2"]
    loads = fails(TypeError("no such layout"), 2)
    assert restored(directory)[0] == 1 and names(directory) == ["1", "2.corrupt"]
    assert loads == [f"{directory}/2", f"{directory}/2", f"{directory}/1"]


def test_an_unknown_error_is_no_damage_while_a_file_cannot_be_read(directory, fails, monkeypatch):
    fails(TypeError("no such layout"), 99)
    opened = failures.Path.open

    def unreadable(path, *arguments, **options):
        if "/d/" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(failures.Path, "open", unreadable)
    with pytest.raises(UnreadableCheckpoint, match=r"/2: cannot be read \(Input/output error\)"):
        restored(directory)
    assert names(directory) == ["1", "2"]


def test_the_best_steps_stay_while_the_metrics_of_one_cannot_be_read(directory, monkeypatch):
    """Its metric would be unknown, so it would not be among the best, and would be deleted."""
    keep = CheckpointConfig(keep=1, keep_best=1)
    checkpoints = Checkpoints(directory / "run", keep)
    for step, loss in ((1, 0.1), (2, 0.5)):
        checkpoints.save(step, STATE, metadata={"metrics": {"loss": loss}})
    checkpoints.wait()
    read = failures.Path.read_text

    def unreadable(path, *arguments, **options):
        if path == directory / "run/1/record/record.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path, *arguments, **options)

    monkeypatch.setattr(failures.Path, "read_text", unreadable)
    checkpoints.save(3, STATE, metadata={"metrics": {"loss": 0.4}})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    monkeypatch.undo()
    checkpoints.save(4, STATE, metadata={"metrics": {"loss": 0.3}})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def test_errors_of_the_content_are_not_called_passing():
    for code in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        assert passing(OSError(code, os.strerror(code))) is None
    assert passing(ValueError("DATA_LOSS: CRC-32C checksum verification failed")) is None
    assert passing(ValueError(TENSORSTORE.format(errno.ENOENT))) is None
    assert passing(ExceptionGroup("two", [KeyError("a"), OSError(errno.EIO, "x")])) == "Input/output error"
    assert stop_request(ValueError("no")) is None
    loop = ValueError("a")
    loop.__cause__ = loop
    assert list(causes(loop)) == [loop]
