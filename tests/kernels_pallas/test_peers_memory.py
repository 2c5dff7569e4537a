"""Peers of the norms, MLPs and losses: they give our definitions' answers, or say why they cannot run."""

import importlib.util
import itertools

import jax
import pytest

from kernels_pallas import OPS
from kernels_pallas.bench import main as bench, timing
from kernels_pallas.bench.peers import PEERS, memory as peers_memory, torch as peers_torch


pytestmark = pytest.mark.recorded


NAMES = list(peers_torch.FUNCTIONS)
OURS = {op.name: op for op in OPS}
TINY = [(name, case) for name in NAMES for case in OURS[name].cases if OURS[name].cases[case].tiny]
PASSES = ("forward", "backward", "both")


def inputs(name, case):
    """Ordinary numbers, and a rotation among them: of those that only rotate."""
    return OURS[name].cases[case].random(jax.random.key(0))


def definition(name, case, pass_):
    op, copies = OURS[name], timing.copies(inputs(name, case))
    return bench.call(op, "xla", op.cases[case].static, pass_, copies).answer()


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name, case", [run for run in TINY if "xla_default" in PEERS[run[0]]])
def test_xla_gives_the_definitions_answer(name, case, pass_):
    static, arrays = OURS[name].cases[case].static, inputs(name, case)
    got = PEERS[name]["xla_default"].call(pass_, timing.copies(arrays), **static).answer()
    assert bench.check_result(got, definition(name, case, pass_), arrays) == "ok"


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_gives_the_definitions_answer(name):
    pytest.importorskip("torch")
    for case, pass_ in itertools.product([case for n, case in TINY if n == name], PASSES):
        static, arrays = OURS[name].cases[case].static, inputs(name, case)
        got = peers_torch.call(name, pass_, timing.copies(arrays), compiled=False, **static).answer()
        assert bench.check_result(got, definition(name, case, pass_), arrays) == "ok", (case, pass_)


TOKAMAX = {"modulated_norm": peers_memory.tokamax_norm, "gated_residual_norm": peers_memory.tokamax_residual_norm,
           "gated_mlp": peers_memory.tokamax_mlp}  # fmt: skip


@pytest.mark.parametrize("name", TOKAMAX)
def test_tokamax_gives_the_definitions_answer(name, monkeypatch):
    """Its plain XLA, as its kernels want a GPU."""
    tokamax = pytest.importorskip("tokamax")
    plain = lambda function: lambda *a, **k: function(*a, **(k | {"implementation": "xla"}))
    for function in ("layer_norm", "gated_linear_unit"):
        monkeypatch.setattr(tokamax, function, plain(getattr(tokamax, function)))
    for case in [case for n, case in TINY if n == name]:
        static, arrays = OURS[name].cases[case].static, inputs(name, case)
        got = TOKAMAX[name](*arrays, **static)
        assert bench.check_result(got, definition(name, case, "forward"), arrays) == "ok", case


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_is_named(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("tokamax", "torch") else found(n, *a))
    reasons = {peer: PEERS[name][peer].unsupported() for peer in PEERS[name]}
    assert reasons.pop("torch_compile") == "needs PyTorch with CUDA, which is not installed"
    if "tokamax" in reasons:
        assert reasons.pop("tokamax") == "needs tokamax: pip install -e '.[peers]'"
    assert set(reasons.values()) <= {None}
