"""Several processes agree on the keys of a private run, and the key-value store does not have them."""

import base64
import json
import re
import stat

import pytest


PRIVATE = """
import itertools
import json
import sys
from pathlib import Path
import jax
from dito_jax import distributed
from dito_jax.data import DigitsData
from dito_jax.privacy.canaries import planted
from dito_jax.privacy import run as run_module
from dito_jax.privacy.run import PrivateRun
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.telemetry.run_directory import FollowedDirectory, RunDirectory
from dito_jax.training.program import LoopConfig
distributed.join()
jax.devices()
state = distributed.distributed.global_state
written = []
class Recording:
    def __init__(self, client):
        self.client = client
    def __getattr__(self, name):
        if name.startswith("key_value_set"):
            written.append(name)
            return lambda *entry, **more: written.append(entry) or getattr(self.client, name)(*entry, **more)
        return getattr(self.client, name)
state.client = Recording(state.client)
run = (RunDirectory if distributed.index() == 0 else FollowedDirectory)(Path(sys.argv[1]))
source = planted(DigitsData().open("train"), 8, run)
run_module.make_plan = lambda *_: StepPlan(4.0, 0.02, len(source), len(source))  # its calibration takes long
privacy = PrivacyConfig(epsilon=9.0, delta=1e-4, dataset="digits")
private = PrivateRun(privacy, LoopConfig(steps=6, batch_size=64), source, run, multiple=8)
(batch,) = itertools.islice(private.batches_after(0, distributed.index(), 2), 1)
distributed.agree(True)
store = [each for folder in ("private", "canaries") for each in state.client.key_value_dir_get(folder)]
pictures = float((source.canaries.image * range(8)).sum())
print(json.dumps({"key": batch["noise_key"].tolist(), "canaries": pictures, "store": store, "written": str(written)}))
distributed.agree(True)
"""


FILES = {"privacy.json": "run", "canaries.json": "secret"}


@pytest.mark.slow(reason="two processes with everything imported")
def test_the_store_has_nothing_from_which_a_secret_follows(start, finish, tmp_path):
    """What a neighbour on the network can read of it, and all that either process has written."""
    folders = {f"DITO_{name}": str(tmp_path / name.lower()) for name in ("SECRETS", "LEDGERS")}
    both = start(PRIVATE, tmp_path / "run", count=2, **folders)
    first, second = (json.loads(finish(process, 0)[0].splitlines()[-1]) for process in both)
    assert first["key"] == second["key"] and first["canaries"] == second["canaries"]
    run, canaries = (json.loads((tmp_path / "run" / file).read_text())[name] for file, name in FILES.items())
    told = {key: json.loads(value) for key, value in first["store"]}
    assert told == {"private/1": {"secret_of": run, "restart": 0}, "canaries/planted": {"secret_of": canaries}}
    assert first["store"] == second["store"]
    entries = re.findall(r"\(.*?\)", second["written"])
    assert entries and all(re.fullmatch(r"\('gather/[01]/1', '\d+ 1'\)", entry) for entry in entries), "only barriers"
    for name in (run, canaries):
        kept = tmp_path / "secrets" / name
        secret = kept.read_bytes()
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and len(secret) == 32
        for text in (secret.hex(), base64.b64encode(secret).decode().rstrip("="), str(secret), str(list(secret))):
            assert text.lower() not in f"{first}".lower()


AGREE = """
import functools
import os
import sys
from dito_jax import distributed
from dito_jax.errors import UserError
from dito_jax.privacy import agreement
distributed.join()
me = distributed.index()
agreement.shared_secret = functools.partial(agreement.shared_secret, seconds=1)
def attempt(name, restart):
    try:
        decision, _ = agreement.agreed("private", name, lambda: {"secret_of": "a", "restart": restart}, "refused")
        print("agreed", decision["restart"], flush=True)
    except UserError as error:
        print(error, flush=True)
os.environ["DITO_SECRETS"] = sys.argv[1]
attempt("1", 0)
honest = agreement.published
if me == 1:  # as somebody does who writes an earlier start to the store
    agreement.published = lambda folder: {"2": honest(folder)["1"], "3": "no JSON"}
attempt("2", 1)
attempt("3", 2)
agreement.published = honest
if me == 1:
    os.environ["DITO_SECRETS"] = sys.argv[2]
attempt("4", 3)
if me == 1:  # a file system of its own, where this process was once number 0
    agreement.run_secret("a")
attempt("5", 4)
"""


@pytest.mark.slow(reason="two processes with everything imported")
def test_processes_that_do_not_have_the_same_keys_do_not_go_on(start, finish, tmp_path):
    both = start(AGREE, tmp_path / "shared", tmp_path / "own", count=2)
    first, second = (finish(process, 0)[0].splitlines() for process in both)
    first, second = ([line for line in lines if "Gloo" not in line] for lines in (first, second))
    assert first[0] == second[0] == "agreed 0" and len(first) == len(second) == 5
    for said in (first[1], second[1], first[4], second[4]):
        assert "is not the same in all processes: set DITO_SECRETS to a folder that all of them share" in said
    assert second[2].startswith("private/3 in the key-value store is not what process 0 has written")
    assert second[3].startswith(f"{tmp_path / 'own' / 'a'}: process 1, on ") and "does not see the secret" in second[3]
    assert first[2] == first[3] == "another process cannot read a secret of this run; see its message."
