"""The benchmark times only what is right, says of the rest why not, and knows what it must measure again."""

import csv
import datetime
import os
import subprocess
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench, measured, timing
from kernels_pallas.hardware import H200
from kernels_pallas.op import PASSES, Case, Cost, Kernel, Op


def take(x, offset, index, *, factor):
    """The toy: a row of x for each index, times a factor, plus an offset."""
    return x[index] * factor + offset


def kernel(forward_error=1.0, backward_error=1.0):
    """The toy by hand; the errors multiply its output, and one of its two gradients."""

    def forward(x, offset, index, *, factor):
        return take(x, offset, index, factor=factor) * forward_error, (x, index)

    def backward(residuals, d_out, *, factor):
        x, index = residuals
        return jnp.zeros_like(x).at[index].add(d_out * factor) * backward_error, d_out.sum(0), None

    return Kernel(forward, backward, lambda *_, **__: None)


def broken(*_, **__):
    raise RuntimeError("out of order\nfor reasons that take a page")


def inputs(key):
    return jax.random.normal(key, (6, 8)), jax.random.normal(key, (8,)), jnp.arange(4)


CASES = {
    name: Case(jax.eval_shape(inputs, jax.random.key(0)), {"factor": 3.0}, tiny=True, make=inputs)
    for name in ("one", "two")
}
TOY = Op(
    "toy",
    take,
    {
        "good": kernel(),
        "wrong_forward": kernel(forward_error=1.1),
        "wrong_backward": kernel(backward_error=1.1),
        "nan": kernel(forward_error=jnp.nan, backward_error=jnp.nan),
        "broken": Kernel(broken, broken, lambda *_, **__: None),
    },
    dict.fromkeys(PASSES, lambda *_, factor: Cost(flops=10**9, bytes=2 * 10**9)),
    CASES,
)


def run(*words, ops=(TOY,)):
    assert bench.main([str(word) for word in words], ops=ops) == 0


def read(path):
    with path.open() as file:
        return {(r["case"], r["implementation"], r["pass"]): r for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new_folder" / "toy.csv"
    run("--case", "one", "--out", path)
    return read(path)


def test_a_row_for_each_implementation_and_pass(rows):
    assert set(rows) == {("one", i, p) for i in ("xla", *TOY.kernels) for p in PASSES}


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("implementation", ["xla", "good"])
def test_what_is_right_is_timed(rows, implementation, pass_):
    row = rows["one", implementation, pass_]
    assert tuple(row) == measured.COLUMNS
    assert row["status"] == "ok"
    assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
    seconds = float(row["median_us"]) / 1e6
    assert float(row["gbps"]) == pytest.approx(2 / seconds, rel=1e-3)  # the file has three decimals
    assert float(row["tflops"]) == pytest.approx(1e-3 / seconds, rel=1e-3)


def test_a_row_says_where_it_is_from(rows):
    for row in rows.values():
        assert row["digest"] == measured.digest(TOY)
        assert (row["jax"], row["jaxlib"]) == (version("jax"), version("jaxlib"))
        assert row["device"] == jax.devices()[0].device_kind
        assert abs(datetime.datetime.now(datetime.UTC).date() - datetime.date.fromisoformat(row["date"])).days < 2
        assert row["commit"]


@pytest.mark.parametrize(
    "implementation, pass_, status",
    [
        ("wrong_forward", "forward", "wrong: relative error 1.0e-01"),
        ("wrong_forward", "backward", "ok"),
        ("wrong_backward", "forward", "ok"),
        ("wrong_backward", "backward", "wrong: relative error 1.0e-01"),
        ("nan", "forward", "wrong: relative error nan"),
        ("nan", "backward", "wrong: relative error nan"),
        ("broken", "forward", "RuntimeError: out of order"),
        ("broken", "backward", "RuntimeError: out of order"),
    ],
)
def test_what_is_wrong_has_a_reason_and_no_time(rows, implementation, pass_, status):
    row = rows["one", implementation, pass_]
    assert row["status"] == status
    assert bool(row["median_us"]) == (status == "ok")


def test_a_case_replaces_only_its_own_rows(tmp_path):
    path = tmp_path / "toy.csv"
    run("--case", "one", "--out", path)
    first = read(path)
    less = Op("toy", take, {"good": kernel()}, TOY.cost, CASES)
    run("--case", "two", "--out", path, ops=(less,))
    both = read(path)
    assert {k: v for k, v in both.items() if k[0] == "one"} == first
    assert {k[1] for k in both if k[0] == "two"} == {"xla", "good"}
    run("--case", "one", "--out", path, ops=(less,))
    assert {k[1] for k in read(path) if k[0] == "one"} == {"xla", "good"}
    assert os.listdir(tmp_path) == ["toy.csv"]


def test_no_answer_of_xla_leaves_the_others_unchecked():
    op = Op("toy", broken, {"good": kernel()}, TOY.cost, CASES)
    xla, good = bench.measure(op, "one", "forward")
    assert xla["status"] == "RuntimeError: out of order"
    assert good["status"].startswith("unchecked") and float(good["median_us"]) > 0


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["no_op"], "choose from toy"),
        (["--case", "no_case"], "choose from one, two"),
        (["--tiny", "--all"], "not allowed with"),
        (["--out", os.devnull + "/toy.csv"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line(words, wanted, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words, ops=(TOY,))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert wanted in line


def planted(op, implementation, digest, status="ok"):
    row = dict.fromkeys(measured.COLUMNS, "1")
    return row | {
        "op": op,
        "case": "one",
        "implementation": implementation,
        "digest": digest,
        "status": status,
    }


def test_stale_lists_old_source_and_what_was_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    today = measured.digest(TOY)
    rows = [
        planted("toy", "good", today),
        planted("toy", "wrong_forward", "0ld"),
        planted("toy", "nan", today, status="wrong: relative error nan"),
        planted("gone", "triton", today),
    ]
    bench.merge(measured.csv_path(H200.device_kind), rows)
    run("--stale")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": measured")[0] for line in lines] == [
        "stale: nvidia_h200: gone one triton",
        "stale: nvidia_h200: toy one wrong_forward",
        "never measured on NVIDIA H200: toy wrong_backward",
        "never measured on NVIDIA H200: toy nan",
        "never measured on NVIDIA H200: toy broken",
    ]
    run("toy", "--stale")
    assert "gone" not in capsys.readouterr().out


def test_stale_starts_no_backend():
    done = subprocess.run(
        [sys.executable, "-m", "kernels_pallas.bench", "--stale"],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_calls_take_turns():
    ran = []
    calls = {name: (ran.append, (name,)) for name in "ab"}
    samples = timing.in_turns(calls, rounds=3)
    assert ran == list("aabb") * 3  # each run after one that is not counted
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_cupti():
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU")
    assert timing.clock() == "CUPTI"
