"""The benchmark times only what is right, says of the rest why not, and knows what it must measure again."""

import csv
import dataclasses
import datetime
import os
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import GROUPED_MATMUL, MODULATED_NORM, STATE_DIGEST, measured, tuning
from kernels_pallas.bench import main as bench, timing
from kernels_pallas.bench.peers import Peer
from kernels_pallas.hardware import H200
from kernels_pallas.op import Case, Cost, Kernel, Op


PASSES = ("forward", "backward", "both")


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
    dict.fromkeys(("forward", "backward"), lambda *_, factor: Cost(flops=10**9, bytes=2 * 10**9)),
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
    work = 2 if pass_ == "both" else 1
    assert float(row["gbps"]) == pytest.approx(2 * work / seconds, rel=1e-3)  # the file has three decimals
    assert float(row["tflops"]) == pytest.approx(1e-3 * work / seconds, rel=1e-3)


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
        ("wrong_forward", "both", "wrong: relative error 1.0e-01"),
        ("wrong_backward", "both", "wrong: relative error 1.0e-01"),
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


def planted(op, implementation, digest, status="ok", device=H200.device_kind):
    row = dict.fromkeys(measured.COLUMNS, "1")
    return row | {
        "op": op,
        "case": "one",
        "implementation": implementation,
        "digest": digest,
        "status": status,
        "device": device,
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
        "never measured on Hopper: toy wrong_backward",
        "never measured on Hopper: toy nan",
        "never measured on Hopper: toy broken",
    ]
    run("toy", "--stale")
    assert "gone" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, counts",
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 PCIe", True),  # hardware.py does not name it
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
    ],
)
def test_a_time_on_any_card_of_hopper_counts(device, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    op = Op("toy", take, {"good": kernel(), "nan": kernel()}, TOY.cost, CASES)
    row = planted("toy", "good", measured.digest(op), device=device)
    bench.merge(measured.csv_path(device), [row])
    never = [f"never measured on Hopper: toy {name}" for name in ("good", "nan")]
    assert bench.stale([op], everything=True) == never[counts:]


def test_what_no_gpu_has_proven_stands_in_for_nobody():
    theirs = dataclasses.replace(kernel(), external=True)
    kernels = {"theirs": theirs, "unproven": dataclasses.replace(theirs, needs_gpu_proof=True), "good": kernel()}
    contestants = bench._contestants(Op("toy", take, kernels, TOY.cost, CASES), CASES["one"], "forward", [])
    assert {name: trusted for name, trusted, _ in contestants} == {
        "xla": True, "theirs": True, "unproven": False, "good": False,
    }  # fmt: skip


def test_a_line_of_a_custom_call_makes_its_families_stale(monkeypatch):
    ops = (STATE_DIGEST, GROUPED_MATMUL, MODULATED_NORM)
    before = [measured.digest(op) for op in ops]
    read = Path.read_bytes
    for source, stale in (("state_digest.cu", [True, False, False]), ("grouped_gemm.cu", [False, True, False])):
        monkeypatch.setattr(Path, "read_bytes", lambda path, source=source: read(path) + b"//" * (path.name == source))
        assert [measured.digest(op) != digest for op, digest in zip(ops, before, strict=True)] == stale


def test_stale_lists_blocks_that_were_tuned_on_old_source(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    entry = dict.fromkeys(tuning.FIELDS, "x") | {"op": "toy", "width": 64, "size": 256, "date": "2026-01-01"}
    old, new = entry | {"mask": "none", "digest": "old"}, entry | {"mask": "causal", "digest": measured.digest(TOY)}
    tuning.save(tmp_path / "nvidia_h200.json", [old, new])
    lines = [line for line in bench.stale([TOY], everything=False) if line.startswith("stale")]
    assert lines == ["stale: nvidia_h200: blocks of x x width=64 mask=none size=256: measured 2026-01-01"]


def test_stale_starts_no_backend():
    done = subprocess.run(
        [sys.executable, "-m", "kernels_pallas.bench", "--stale"],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def library(error=1.0):
    return dataclasses.replace(kernel(forward_error=error), external=True)


def test_where_xla_fails_a_library_stands_in_but_no_kernel_of_ours():
    ours = {"good": kernel(), "wrong": kernel(forward_error=1.1)}
    op = Op("toy", broken, {**ours, "theirs": library()}, TOY.cost, CASES)
    assert {row["implementation"]: row["status"] for row in bench.measure(op, "one", "forward")} == {
        "xla": "RuntimeError: out of order",
        "theirs": "ok",
        "good": "ok",
        "wrong": "wrong: relative error 1.0e-01",
    }


def test_what_xla_says_counts_more_than_a_library():
    op = Op("toy", take, {"good": kernel(), "theirs": library(error=1.1)}, TOY.cost, CASES)
    status = {row["implementation"]: row["status"] for row in bench.measure(op, "one", "forward")}
    assert status == {"xla": "ok", "theirs": "wrong: relative error 1.0e-01", "good": "ok"}


def test_a_peer_has_a_row_and_is_never_chosen(tmp_path, monkeypatch):
    def call(pass_, copies, *, factor):
        return timing.call(lambda *arrays: take(*arrays, factor=factor), pass_, copies)

    peers = {
        "friend": Peer(lambda *_, **__: None, call),
        "absent": Peer(lambda *_, **__: "needs what is not here", call),
    }
    monkeypatch.setitem(bench.PEERS, "toy", peers)
    op = Op("toy", take, {"good": kernel()}, TOY.cost, CASES)
    path = tmp_path / "cpu.csv"
    run("--case", "one", "--out", path, ops=(op,))
    found = read(path)
    assert set(found) == {("one", i, p) for i in ("xla", "good", "friend", "absent") for p in PASSES}
    assert float(found["one", "friend", "backward"]["median_us"]) > 0
    assert found["one", "absent", "both"]["status"] == "needs what is not here"
    assert not found["one", "absent", "both"]["median_us"]

    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    measured.rows.cache_clear()
    sums = {}
    for (_, implementation, pass_), row in found.items():
        if pass_ != "both" and implementation in ("xla", "good"):
            sums[implementation] = sums.get(implementation, 0) + float(row["median_us"])
    static = {"factor": 3.0}
    assert op.choose(*CASES["one"].arrays, **static) == min(sums, key=sums.__getitem__)
    measured.rows.cache_clear()


def test_the_fastest_adds_forward_and_backward_and_nothing_else(tmp_path, monkeypatch):
    times = {"xla": (5, 5, 1), "good": (4, 5, 30), "stranger": (1, 1, 1)}
    rows = [
        planted("toy", name, "today") | {"pass": pass_, "median_us": str(time)}
        for name, row in times.items()
        for pass_, time in zip(PASSES, row, strict=True)
    ]
    bench.merge(tmp_path / "cpu.csv", rows)
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    measured.rows.cache_clear()
    op = Op("toy", take, {"good": kernel()}, TOY.cost, CASES)
    assert measured.fastest(op, ["good", "xla"], CASES["one"].arrays, {"factor": 3.0}) == "good"
    measured.rows.cache_clear()


def tree_reference(pair, weights, *, flag):
    """A toy with a tree and a None among its arrays, and two outputs of which one may be infinite."""
    assert weights is None and flag
    return {"sum": pair["x"] + pair["y"], "log": jnp.log(jnp.abs(pair["x"]))}


def tree_inputs(key):
    x, y = jax.random.normal(key, (2, 5, 8))
    return {"x": x.at[0, 0].set(0.0), "y": y.astype(jnp.bfloat16), "count": jnp.arange(5)}, None


def tree_kernel(error):
    return Kernel(
        lambda *arrays, flag: (jax.tree.map(lambda a: a * error, tree_reference(*arrays, flag=flag)), arrays),
        lambda residuals, d_out, flag: jax.vjp(lambda *a: tree_reference(*a, flag=flag), *residuals)[1](d_out),
        lambda *_, **__: None,
    )


def test_trees_of_arrays_are_measured_and_their_values_cost(monkeypatch):
    case = Case(jax.eval_shape(tree_inputs, jax.random.key(0)), {"flag": True}, tiny=True, make=tree_inputs)
    count = lambda pair, weights, *, flag: Cost(flops=int(pair["count"].sum()) * 10**9, bytes=1)
    kernels = {"good": tree_kernel(1.0), "wrong": tree_kernel(1.5)}
    op = Op("toy", tree_reference, kernels, {"forward": count, "backward": count}, {"one": case})
    assert bench.cost(op, "both", case.random(jax.random.key(0)), case.static).flops == 20 * 10**9
    assert bench.cost(op, "forward", case.random(jax.random.key(0)), case.static).flops == 10 * 10**9
    rows = {row["implementation"]: row for row in bench.measure(op, "one", "forward")}
    assert [rows[name]["status"] for name in ("xla", "good")] == ["ok", "ok"]
    assert rows["wrong"]["status"].startswith("wrong: relative error 5.0e-01")
    seconds = float(rows["good"]["median_us"]) / 1e6
    assert float(rows["good"]["tflops"]) == pytest.approx(1e-2 / seconds, rel=1e-3)


def test_gradients_of_trees_are_held_to_xla():
    case = Case(jax.eval_shape(inputs, jax.random.key(0)), {"factor": 3.0}, make=inputs)
    pair = lambda x, offset, index, *, factor: (take(x, offset, index, factor=factor), x * 2)
    op = Op("toy", pair, {}, TOY.cost, {"one": case})
    for pass_ in PASSES:
        [row] = bench.measure(op, "one", pass_)
        assert row["status"] == "ok" and float(row["median_us"]) > 0


def test_an_op_without_backward_has_only_its_forward(tmp_path):
    op = Op("toy", take, {"good": kernel()}, {"forward": TOY.cost["forward"]}, CASES)
    run("--case", "one", "--out", tmp_path / "toy.csv", ops=(op,))
    assert set(read(tmp_path / "toy.csv")) == {("one", "xla", "forward"), ("one", "good", "forward")}


def test_a_sweep_is_run_when_asked_for(tmp_path):
    op = Op("toy", take, {}, {"forward": TOY.cost["forward"]}, {"one": CASES["one"]}, {"two": CASES["two"]})
    for words, wanted in [
        ([], {"one"}),
        (["--sweep"], {"two"}),
        (["--all"], {"one", "two"}),
        (["--case", "two"], {"two"}),
    ]:
        path = tmp_path / f"{len(words)}{wanted}.csv"
        run(*words, "--out", path, ops=(op,))
        assert {case for case, _, _ in read(path)} == wanted


def test_calls_take_turns():
    ran = []
    calls = {name: timing.Call(ran.append, [(name,)]) for name in "ab"}
    samples = timing.in_turns(calls, rounds=3)
    assert ran == list("aabb") * 3  # each run after one that is not counted
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_each_run_takes_the_next_copy_of_the_inputs():
    ran = []
    timing.in_turns({"a": timing.Call(ran.append, [(0,), (1,), (2,)])}, rounds=4)
    assert ran[1::2] == [1, 2, 0, 1]  # those that count
    assert all(counted != before for before, counted in zip(ran[::2], ran[1::2], strict=True))


def test_copies_outgrow_the_cache_and_are_apart():
    arrays = {"x": jnp.ones(2**18)}, None, jnp.ones(2**18, jnp.int32)  # 2 MiB
    copies = timing.copies(arrays, cache=5 * 2**20)
    assert len(copies) == 8
    assert len({copy[0]["x"].unsafe_buffer_pointer() for copy in copies}) == 8
    assert len(timing.copies(arrays, cache=2**40)) == timing.MOST_COPIES
    assert len(timing.copies(arrays)) == 1  # a CPU's is not our subject


@pytest.mark.parametrize("pass_", PASSES)
def test_a_backward_rotates_all_that_it_reads(pass_):
    call = timing.call(jnp.sin, pass_, timing.copies((jnp.ones(1000),), cache=4000))
    pointers = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(copy)} for copy in call.copies]
    assert len(pointers) == 3
    assert not (pointers[0] & pointers[1] or pointers[1] & pointers[2] or pointers[0] & pointers[2])


def test_cupti_counts_the_run_after_the_one_that_warms_up(monkeypatch):
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")  # jax's own, over a stand-in for CUPTI
    events = []

    def timings(finalize):
        events.append("read")
        return [("a_kernel", 0.25), ("another", 0.5)]  # milliseconds

    cupti = types.SimpleNamespace(_cupti_init=lambda: events.append("start"), _cupti_get_timings=timings)
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=cupti))
    call = timing.Call(events.append, [(number,) for number in range(3)], wait=lambda _: events.append("wait"))
    assert timing._by_cupti(call, 1) == 750
    assert events == [1, "wait", "start", 2, "wait", "read"]


def test_a_copy_is_counted_both_ways(monkeypatch):
    monkeypatch.setattr(timing, "microseconds", lambda call, turn: 2.0)
    assert timing.copy_gbps(10**6) == pytest.approx(2 * 10**6 / 2e-6 / 1e9)


@pytest.mark.gpu
def test_a_gpu_is_timed_by_cupti():
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU")
    assert timing.clock() == "CUPTI"


def test_results_that_are_bits_are_right_or_wrong_to_the_bit():
    arrays, want = (jnp.ones(3), jnp.zeros(1, jnp.int32)), [jnp.array([7, 2**31], jnp.uint32)]
    assert bench.check_result([want[0] + 0], want, arrays) == "ok"
    assert bench.check_result([want[0] ^ 1], want, arrays) == "wrong: integers differ"
    assert bench._dtype((jnp.zeros(1, jnp.int8),)) == "float32" and bench._dtype(arrays) == "float32"
