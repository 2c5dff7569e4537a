"""Other people's products of many experts give our answer; a yardstick does as much work and is not held to it."""

import sys
import types

import jax
import numpy as np
import pytest

from kernels_pallas import OPS, backend
from kernels_pallas.backend import Target
from kernels_pallas.bench import main as bench, peers, timing
from kernels_pallas.bench.peers import experts as peers_experts


pytestmark = pytest.mark.recorded


OF = {op.name: op for op in OPS if op.name in ("grouped_matmul", "expert_mlp")}
SIZES = [(name, case) for name in OF for case in ("tiny_even", "tiny_random", "tiny_one")]


def floating(tree):
    return [np.asarray(a) for a in jax.tree.leaves(tree) if a.dtype == np.float32]


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
@pytest.mark.parametrize(("name", "case"), SIZES)
def test_ragged_dot_gives_the_definitions_answer(name, case, pass_):
    arrays = OF[name].cases[case].random(jax.random.key(0))
    got = floating(peers.PEERS[name]["ragged_dot"].call(pass_, timing.copies(arrays)).answer())
    want = floating(bench.call(OF[name], "xla", {}, pass_, timing.copies(arrays)).answer())
    assert len(got) == len(want) > 0
    for mine, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", OF)
def test_the_yardstick_does_as_many_flops_and_is_not_judged(name):
    case = OF[name].cases["tiny_even"]
    arrays = case.random(jax.random.key(0))
    function = {"grouped_matmul": peers_experts.dense, "expert_mlp": peers_experts.dense_mlp}[name]
    counted = jax.jit(function).lower(*arrays).cost_analysis()["flops"]
    assert OF[name].cost["forward"](*arrays).flops == pytest.approx(counted, rel=0.1)
    rows = {row["implementation"]: row for row in bench.measure(OF[name], "tiny_even", "forward")}
    assert rows["dense"]["status"].startswith("yardstick") and float(rows["dense"]["median_us"]) > 0
    assert rows["ragged_dot"]["status"] == "ok"


def test_tokamax_is_asked_for_a_kernel_by_its_name(monkeypatch):
    """A stand-in for tokamax takes what it is given."""
    asked = []

    def ragged_dot(x, w, group_sizes, *, implementation):
        asked.append(implementation)
        return jax.lax.ragged_dot(x, w, group_sizes)

    tokamax = types.ModuleType("tokamax")
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setattr(tokamax, "ragged_dot", ragged_dot, raising=False)
    arrays = OF["grouped_matmul"].cases["tiny_even"].random(jax.random.key(0))
    for name in ("tokamax_mosaic", "tokamax_triton"):
        peers.PEERS["grouped_matmul"][name].call("forward", timing.copies(arrays)).answer()
    assert list(dict.fromkeys(asked)) == ["mosaic", "triton"]


def test_what_cannot_be_timed_says_why(monkeypatch):
    reason = peers.PEERS["expert_mlp"]["tokamax_triton"].unsupported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reason() == "needs tokamax: pip install -e '.[peers]'"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason() == "tokamax's kernels need a GPU, got cpu"
    monkeypatch.setattr(backend, "target", lambda: Target("gpu", "NVIDIA H200", 9.0))
    assert reason() is None
