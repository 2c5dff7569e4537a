"""The secret of a run and the keys derived from it."""

import hmac
import itertools
import os
import secrets
import stat

import jax
import numpy as np
import pytest

from dito_jax.errors import UserError
from dito_jax.privacy.keys import StepKeys, run_secret, secret_path, shared_secret


SECRET = bytes(range(32))


def test_every_part_of_what_a_key_is_for_changes_it():
    made = [
        StepKeys(secret, run, restart).key(step, purpose).tobytes()
        for secret, run, restart, step, purpose in itertools.product(
            (SECRET, SECRET[:-1] + b"x"), ("a", "a1"), (0, 1, 11), (1, 11, 111), ("noise", "batch", "draw")
        )
    ]
    assert len(set(made)) == len(made)


def test_keys_have_all_their_bits():
    """jax.random.key(int) keeps 32 bits of it; these two differ in the other half alone."""
    assert np.all(jax.random.key_data(jax.random.key(2**40 + 5)) == jax.random.key_data(jax.random.key(5)))
    data = np.stack([StepKeys(SECRET, "run", 0).key(step, "noise") for step in range(200)])
    assert data.dtype == np.uint32 and data.shape == (200, 8)
    for word in data.T:
        ones = [(word >> bit) & 1 for bit in range(32)]
        assert all(60 < bits.sum() < 140 for bits in ones)
    draw = lambda words: jax.random.normal(jax.random.wrap_key_data(np.array(words, np.uint32)))
    assert draw([0, 5]) != draw([256, 5])


def test_generators_are_the_same_for_the_same_step_alone():
    keys = StepKeys(SECRET, "run", 0)
    one, same, other = (keys.generator(step, "batch").random(3) for step in (4, 4, 5))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_generators_have_all_256_bits(monkeypatch):
    """Of 32, whoever saw a batch could try them all, and know every batch of the step."""
    keys = StepKeys(SECRET, "run", 0)
    seed = keys.generator(4, "batch").bit_generator.seed_seq.entropy
    assert seed.to_bytes(32) == keys.key(4, "batch").tobytes()
    digest = int.from_bytes(keys.key(4, "batch").tobytes())
    drawn = set()
    for changed in [digest, *(digest ^ (1 << bit) for bit in range(256))]:
        monkeypatch.setattr(hmac, "digest", lambda *_, changed=changed: changed.to_bytes(32))
        drawn.add(keys.generator(4, "batch").bytes(8))
    assert len(drawn) == 257


def test_a_secret_is_made_once_apart_from_the_run_and_is_its_owners(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    secret = run_secret("a")
    assert len(secret) == 32 and run_secret("a") == secret != run_secret("b")
    assert os.stat(secret_path("a")).st_mode & 0o777 == 0o600
    assert sorted(path.name for path in (tmp_path / "secrets").iterdir()) == ["a", "b"]
    os.chmod(secret_path("a"), 0o640)
    with pytest.raises(UserError, match="other users may read"):
        run_secret("a")
    secret_path("b").write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes, wanted 32"):
        run_secret("b")


def test_no_text_has_the_secret():
    assert SECRET.hex() not in repr(StepKeys(SECRET, "run", 0)) and "\\x01" not in repr(StepKeys(SECRET, "run", 0))


@pytest.fixture
def own_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    return tmp_path / "secrets"


def test_a_secret_is_its_owners_from_its_creation_on(own_secrets, monkeypatch):
    """With a umask that takes nothing away; looked at before the first byte is written, and before it has its name."""
    seen, made = [], secrets.token_bytes

    def looking(size):
        (only,) = own_secrets.iterdir()
        seen.append((stat.S_IMODE(only.stat().st_mode), only.stat().st_size))
        return made(size)

    monkeypatch.setattr(secrets, "token_bytes", looking)
    before = os.umask(0)
    try:
        run_secret("a")
    finally:
        os.umask(before)
    assert seen == [(0o600, 0)] and stat.S_IMODE(own_secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE(secret_path("a").stat().st_mode) == 0o600


def test_the_secret_of_another_user_is_refused(own_secrets, monkeypatch):
    run_secret("a")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    for read in (run_secret, shared_secret):
        with pytest.raises(
            UserError, match=f"secrets/a: it belongs to user {me}, and this process runs as user {me + 1}"
        ):
            read("a")


def test_what_is_no_file_of_a_secret_is_refused(own_secrets):
    os.makedirs(own_secrets / "folder")
    os.mkfifo(own_secrets / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=f"secrets/{name}: not a regular file"):
            run_secret(name)
    for name in ("../a", "a/b", "", "."):
        with pytest.raises(UserError, match="names no secret of a run"):
            secret_path(name)


def test_a_secret_that_is_not_seen_is_not_made(own_secrets):
    with pytest.raises(UserError, match="secrets/a: process 0, on .* does not see .* set DITO_SECRETS to a folder"):
        shared_secret("a", seconds=0.2)
    assert not own_secrets.exists()
    assert run_secret("a") == shared_secret("a")


def test_a_full_disk_names_the_secret_and_leaves_nothing(own_secrets, files_at_most):
    with files_at_most(10), pytest.raises(UserError, match="secrets/a: File too large: free some space"):
        run_secret("a")
    assert list(own_secrets.iterdir()) == []
