"""The compile report matches what happened."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax._src import monitoring
from jax.experimental.compilation_cache import compilation_cache

from dito_jax.training.compiling import CompileReport, compile_step, enable_compilation_cache


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
