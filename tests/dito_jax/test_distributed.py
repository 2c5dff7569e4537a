"""Multi-process runs: initialization from the environment, key-value store and barriers."""

import random

import pytest

from dito_jax import distributed
from dito_jax.errors import UserError


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
