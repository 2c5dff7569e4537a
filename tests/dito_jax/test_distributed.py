"""Multi-process runs: initialization from the environment, key-value store and barriers."""

import json
import random

import jax
import pytest

from dito_jax import distributed
from dito_jax.errors import UserError
from dito_jax.run import same_start


TALK = """
from dito_jax import distributed
distributed.join()
me = distributed.index()
distributed.publish(f"at/{me}", "old")
distributed.publish(f"at/{me}", f"step {me}")
assert distributed.agree(True)
print(distributed.count(), distributed.published("at"), distributed.published("a"), distributed.agree(me == 0))
"""


def test_two_processes_read_each_other_and_agree(start, finish):
    both = start(TALK, count=2)
    for process in both:
        assert finish(process, 0)[0].splitlines()[-1] == "2 {'0': 'step 0', '1': 'step 1'} {} False"


LISTENING = """
import os
from pathlib import Path
from dito_jax import distributed
distributed.join()
port = f"{int(os.environ['JAX_COORDINATOR_ADDRESS'].rpartition(':')[2]):04X}"
sockets = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
print("listens on", *{row[1].rpartition(":")[0] for row in sockets if row[1].endswith(f":{port}") and row[3] == "0A"})
distributed.agree(True)
"""


def test_the_store_of_processes_on_one_host_is_not_reached_from_others(start, finish):
    """127.0.0.1 in hexadecimal, little-endian, perhaps as an IPv6 address; JAX's default is all interfaces, zeros."""
    for process in start(LISTENING, count=2):
        said = next(line for line in finish(process, 0)[0].splitlines() if line.startswith("listens"))
        assert said in ("listens on 0100007F", "listens on 0000000000000000FFFF00000100007F")


def test_two_tasks_of_slurm_find_each_other(start, finish):
    """By the variables that srun sets, as docs/multi-gpu.md lists them."""
    job = {"SLURM_JOB_ID": str(random.randrange(4096)), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [start(TALK, **job, SLURM_PROCID=task, SLURM_LOCALID=task)[0] for task in ("0", "1")]
    for task in tasks:
        assert finish(task, 0)[0].splitlines()[-1] == "2 {'0': 'step 0', '1': 'step 1'} {} False"


def test_one_process_is_its_own_store(start, finish):
    (one,) = start(TALK, JAX_COORDINATOR_ADDRESS="host:1", JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0", SLURM_NTASKS="1")
    assert finish(one, 0)[0] == "1 {'0': 'step 0'} {} True\n"


FROZEN = """
import os, signal, time
from dito_jax import distributed
distributed.join()
if distributed.index() == 0:
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1)
began = time.monotonic()
for ask in (lambda: distributed.publish("a/b", "c", seconds=1), lambda: distributed.published("a", seconds=1)):
    try:
        ask()
    except TimeoutError as error:
        print(error, flush=True)
os._exit(0)
"""


def test_a_store_that_does_not_answer_is_not_waited_for(start, finish):
    _, other = start(FROZEN, count=2)
    assert finish(other, 0)[0] == "process 0 did not answer within 1 s\n" * 2


@pytest.mark.parametrize(
    ("address", "count", "index", "wrong"),
    [
        (None, "2", "0", "JAX_NUM_PROCESSES, JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS"),
        ("host:1", None, None, "JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ("host:1", "two", "0", "JAX_NUM_PROCESSES is 'two'"),
        ("host:1", "2", "2", "JAX_PROCESS_ID '2'"),
        ("host", "2", "1", "JAX_COORDINATOR_ADDRESS is 'host'"),
    ],
)
def test_a_wrong_environment_is_one_line(address, count, index, wrong, monkeypatch):
    for name, value in zip(distributed.GIVEN, (address, count, index), strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=wrong) as error:
        distributed.join()
    assert "\n" not in str(error.value)


TOGETHER = """
import json, sys, time
import jax, numpy as np
from pathlib import Path
from dito_jax import distributed
from dito_jax.errors import UserError
from dito_jax.resilience.guard import Guard
from dito_jax.run import same_start
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.health import GuardConfig

jax.config.update("jax_num_cpu_devices", 2)
distributed.join()
me, said = distributed.index(), {}
try:
    same_start.check_same_start(json.dumps({"optimizer": {"learning_rate": 1e-3 * (1 + me)}}), Path(sys.argv[1]))
except UserError as error:
    said["refused"] = str(error)
same_start.check_same_start("{}", Path(sys.argv[1]))
same_start.PAUSES = (0.1,)
try:
    mine = Path(sys.argv[1]) / str(me)
    (mine / "7").mkdir(parents=True) if me else None
    same_start.check_same_start("{}", mine)
except UserError as error:
    said["steps"] = str(error)

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
groups = lambda: {key for key, _ in distributed.distributed.global_state.client.key_value_dir_get_bytes("cpu:gloo")}
distributed.connect(mesh)
connected = groups()
spread = jax.NamedSharding(mesh, jax.P("fsdp", "data"))
x = jax.make_array_from_callback((4, 4), spread, lambda at: np.ones((4, 4))[at])
sums = jax.jit(lambda x: (x.sum(0), x.sum(1), x.sum()), out_shardings=jax.NamedSharding(mesh, jax.P()))(x)
jax.block_until_ready(sums)
said["groups"] = [len(connected), len(groups() - connected)]

run = RunDirectory(sys.argv[2])
guard = Guard(GuardConfig(), run, Events(run), first=3)
whole = jax.NamedSharding(mesh, jax.P())
copies = lambda value: jax.make_array_from_single_device_arrays(
    (2,), whole, [jax.device_put(np.float32([1, value]), device) for device in jax.local_devices()])
said["equal"] = [guard.compare_processes(5, {"x": copies(2), "y": x}), guard.diverged]
said["unequal"] = [guard.compare_processes(8, {"x": copies(2), "z": copies(2 + me)}), guard.diverged, guard.burst()]
said["events"] = [row["said"] for row in read_events(run, "divergence")]

distributed.REPORT_EVERY = 0.3
time.sleep(1.5 * me)
said["gathered"] = distributed.gather(f"from {me}", "the meeting")
print(json.dumps(said), flush=True)
if me == 1:
    distributed.leave(3)
try:
    distributed.agree(True, "the end")
except RuntimeError as error:
    print(error, flush=True)
distributed.leave(0)
"""


def test_processes_meet_without_a_collective_and_are_compared(start, finish, tmp_path):
    first, second = start(TOGETHER, tmp_path / "checkpoints", tmp_path / "run", count=2)
    finish(second, 3)
    out, err = finish(first, 0)
    said, left = [line for line in out.splitlines() if "Gloo" not in line]
    said = json.loads(said)
    assert said["refused"].startswith(
        "process 1 differs from process 0 in optimizer.learning_rate: start all processes"
    )
    assert "process 0 sees checkpoints of the steps [], process 1 of [7]: wanted one run directory" in said["steps"]
    # Each pair and both pairs along each axis, and all four: later collectives need no further connection, which would
    # have to be made by all processes within 30 s.
    assert said["groups"] == [12, 0]
    assert said["equal"] == [True, False] and said["unequal"] == [False, True, True]
    assert "step 8: the processes differ in ['z'] and 0 more arrays (process 1 from the others)" in said["events"][0]
    assert "equal after step 5" in said["events"][0]
    assert said["gathered"] == ["from 0", "from 1"]
    assert "process 0: at the meeting, waiting for process 1 since" in err
    assert left == "process 1 has ended with exit code 3, and did not come to the end"


def test_without_the_preemption_service_several_processes_do_not_start(monkeypatch):
    for name, value in zip(distributed.GIVEN, ("host:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with pytest.raises(UserError, match="JAX_ENABLE_PREEMPTION_SERVICE is off"):
            distributed.join()
    finally:
        jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("digests", "names"),
    [
        ([{"a": "1"}, {"a": "1"}, {"a": "1"}], None),
        ([{"a": "1", "b": "1"}, {"a": "1", "b": "1"}, {"a": "1", "b": "2"}], "process 2 differs from process 0 in b:"),
        ([{"a": "1"}, {"a": "1", "package jax": "2"}], "process 1 differs from process 0 in package jax:"),
        ([{"a": "1"}, {}], "process 1 differs from process 0 in a:"),
    ],
)
def test_what_differs_between_processes_is_named(digests, names):
    line = same_start.difference(digests)
    assert line is None if names is None else line is not None and line.startswith(names)
