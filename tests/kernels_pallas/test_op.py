"""Choosing an implementation: what is measured, what is not proven, and what cannot run, on a toy op."""

import csv

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import backend, measured
from kernels_pallas.op import Case, Cost, Kernel, Op, _log_once


def double(x):
    return 2 * x


def kernel(refusal=None, **options) -> Kernel:
    return Kernel(lambda x: (double(x), ()), lambda residuals, d_out: (2 * d_out,), lambda x: refusal, **options)


def toy(**kernels) -> Op:
    cost = {pass_: lambda x: Cost(x.size, x.size) for pass_ in ("forward", "backward")}
    return Op("toy", double, kernels, cost, {"four": Case((jax.ShapeDtypeStruct((4,), jnp.float32),))})


X = jnp.arange(4, dtype=jnp.float32)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes rows of this device's results: (implementation, pass, status, median, digest)."""
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    measured.rows.cache_clear()

    def write(*rows, op):
        with measured.csv_path(backend.target().kind).open("w", newline="") as file:
            writer = csv.DictWriter(file, measured.COLUMNS, restval="")
            writer.writeheader()
            for implementation, pass_, status, median in rows:
                row = {"op": op.name, "case": "four", "pass": pass_, "implementation": implementation}
                writer.writerow(row | {"status": status, "median_us": median, "digest": measured.digest(op)})
        measured.rows.cache_clear()

    yield write
    measured.rows.cache_clear()


def test_without_measurements_the_tables_order_decides(results):
    assert toy(first=kernel(), second=kernel()).choose(X) == "first"
    assert toy(first=kernel("no such chip"), second=kernel()).choose(X) == "second"
    assert toy(first=kernel("no such chip")).choose(X) == "xla"


def test_the_fastest_of_both_passes_together_is_chosen(results):
    op = toy(first=kernel(), second=kernel())
    times = {"first": (10, 30), "second": (20, 15), "xla": (50, 50)}
    results(*[(i, p, "ok", t) for i, both in times.items() for p, t in zip(op.passes, both, strict=True)], op=op)
    assert op.choose(X) == "second"


def test_a_kernel_that_needs_proof_waits_for_a_passing_run_of_its_own_source(results, monkeypatch):
    op = toy(unproven=kernel(needs_gpu_proof=True), second=kernel())
    assert op.choose(X) == "second"
    assert op.runnable(X) == ["unproven", "second", "xla"], "by its name it runs all the same"
    results(("second", "forward", "ok", 1), op=op)
    assert op.choose(X) == "second"
    results(("unproven", "forward", "ok", 1), ("unproven", "backward", "wrong: relative error 1", ""), op=op)
    assert op.choose(X) == "second"
    results(("unproven", "forward", "unchecked: nobody else", 1), op=op)
    assert op.choose(X) == "second"
    results(("unproven", "forward", "ok", 1), ("unproven", "backward", "unchecked: nobody else", 1), op=op)
    assert op.choose(X) == "unproven"
    monkeypatch.setattr(measured, "digest", lambda op: "of a later day")
    assert op.choose(X) == "second"


REASONS = [
    "toy: not using unproven: results/ has no passing run of the current source on this device; "
    "implementation='unproven' selects it.",
    "toy: not using absent: a reason of its own.",
]


@pytest.mark.parametrize(
    ("platform", "lines"),
    [("gpu", REASONS), ("cpu", ["CPU: using XLA implementations (the GPU kernels need an NVIDIA GPU)."])],
)
def test_why_kernels_were_not_chosen_is_one_line_each_on_a_gpu_and_one_in_all_elsewhere(
    platform, lines, results, caplog, monkeypatch
):
    monkeypatch.setattr(backend, "target", lambda: backend.Target(platform, "a device", None))
    op = toy(unproven=kernel(needs_gpu_proof=True), absent=kernel("a reason of its own"))
    _log_once.cache_clear()
    op.choose(X), op.choose(X)
    assert [r.message for r in caplog.records] == lines
