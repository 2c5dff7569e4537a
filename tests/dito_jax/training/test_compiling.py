"""The compile report matches what happened."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring
from jax.experimental.compilation_cache import compilation_cache

from dito_jax.errors import UserError
from dito_jax.training.compilation_cache import enable_compilation_cache
from dito_jax.training.compiling import CompileReport, compile_step


SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def settings():
    """Puts the cache's settings back."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_step(number: float):
    """A program that no other test compiles."""
    return jax.jit(lambda x: jnp.tanh(x @ x) * number)


X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def test_cache_is_missed_then_hit_and_follows_its_directory(tmp_path, settings):
    hits = []
    for name in ("a", "a", "b"):
        enable_compilation_cache(tmp_path / name)
        hits.append(compile_step(make_step(1.25), X)[1].cache_hit)
    assert hits == [False, True, False]
    assert list((tmp_path / "a").iterdir()) and list((tmp_path / "b").iterdir())


def entry_of(cache: Path, number: float) -> Path:
    """Compiles a program in an empty cache; the file of its entry."""
    before = set(cache.iterdir()) if cache.exists() else set()
    enable_compilation_cache(cache)
    compile_step(make_step(number), X)
    (entry,) = set(cache.iterdir()) - before
    return entry


def test_an_entry_of_another_program_is_not_run_and_a_damaged_one_is_mended(tmp_path, settings, caplog):
    first, second = entry_of(tmp_path / "a", 2.25), entry_of(tmp_path / "a", 3.25)
    whole = first.read_bytes()
    x = jnp.eye(64) * 0.5
    for content in (second.read_bytes(), whole[:-1], whole[: len(whole) // 2], b"", whole[:-1] + b"x", whole[32:]):
        first.write_bytes(content)
        enable_compilation_cache(tmp_path / "a")
        compiled, report = compile_step(make_step(2.25), X)
        assert report.cache_hit is False and "is damaged, or not of this program" in caplog.messages[-1]
        np.testing.assert_allclose(compiled(x)[0, 0], np.tanh(0.25) * 2.25, rtol=1e-6)
        enable_compilation_cache(tmp_path / "a")
        assert compile_step(make_step(2.25), X)[1].cache_hit is True
    assert len(caplog.messages) == 6


def test_a_cache_that_others_can_write_to_is_refused(tmp_path, settings, monkeypatch):
    before = os.umask(0)
    try:
        enable_compilation_cache(tmp_path / "deep" / "made")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "made").stat().st_mode & 0o777 == 0o700
    for mode, fine in ((0o755, True), (0o775, False), (0o707, False), (0o700, True)):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache").chmod(mode)
        if fine:
            enable_compilation_cache(tmp_path / "cache")
            continue
        with pytest.raises(UserError, match=rf"others can write to the compilation cache \(mode {mode:o}\)"):
            enable_compilation_cache(tmp_path / "cache")
    os.chown(tmp_path / "cache", 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user, who could run code in yours: set DITO_CACHE"):
        enable_compilation_cache(tmp_path / "cache")


def test_no_cache_is_neither_hit_nor_missed(settings):
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    _, report = compile_step(make_step(1.5), X)
    assert report.cache_hit is None
    assert "(no cache)" in report.line()


def test_compiled_step_is_the_step_and_its_seconds_add_up():
    start = time.perf_counter()
    compiled, report = compile_step(make_step(1.75), X)
    seconds = time.perf_counter() - start
    x = jax.random.normal(jax.random.key(0), X.shape)
    assert (compiled(x) == make_step(1.75)(x)).all()
    stages = (report.trace_seconds, report.lower_seconds, report.compile_seconds)
    assert min(stages) > 0 and sum(stages) <= seconds


def test_each_stage_is_timed_under_its_own_name():
    def slow_to_trace(x):
        time.sleep(1.0)
        return x + 1

    _, report = compile_step(jax.jit(slow_to_trace), X)
    assert report.trace_seconds > 1.0 > report.lower_seconds


def test_peak_memory_grows_by_the_array_that_is_added():
    small = compile_step(jax.jit(lambda x: x + 1), X)[1].peak_bytes
    large = compile_step(jax.jit(lambda x, y: (x + 1, y + 1)), X, jax.ShapeDtypeStruct((1000,), jnp.float32))[1]
    assert small >= 2 * 64 * 64 * 4
    assert large.peak_bytes >= small + 2 * 1000 * 4


def test_no_listener_is_left_behind():
    before = monitoring.get_event_listeners().copy()
    compile_step(make_step(2.0), X)
    with pytest.raises(TypeError):
        compile_step(jax.jit(lambda x: x + "one"), X)
    with pytest.raises(jax.errors.JaxRuntimeError):
        # A program that traces and lowers, and that XLA refuses.
        compile_step(jax.jit(lambda x: x, compiler_options={"xla_no_such_option": 1}), X)
    assert monitoring.get_event_listeners() == before


def test_report_is_one_line_and_a_dict():
    report = CompileReport(0.5, 0.25, 12.5, False, 3 * 2**20)
    assert report.line() == (
        "traced in 0.50 s, lowered in 0.25 s, compiled in 12.50 s (cache miss), peak memory 3.0 MiB per device"
    )
    assert report.asdict() == {
        "trace_seconds": 0.5,
        "lower_seconds": 0.25,
        "compile_seconds": 12.5,
        "cache_hit": False,
        "peak_bytes": 3 * 2**20,
    }
