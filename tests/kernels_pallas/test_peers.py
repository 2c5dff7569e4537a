"""Other people's attention gives our answer under every mask, by the mask's own form where it has one."""

import dataclasses
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import FLASH_ATTENTION, OPS, AttentionMask
from kernels_pallas.backend import Target
from kernels_pallas.bench import main as bench, peers, timing
from kernels_pallas.bench.peers import attention as attention_peers


pytestmark = pytest.mark.recorded


OPTIONS = {"scale": None, "softcap": None, "return_lse": False}
T, S = 24, 40
MASKS = {
    "none": (None, S),
    "causal": (lambda: AttentionMask.causal(T), T),
    "causal_longer_keys": (lambda: AttentionMask.causal(T, S), S),
    "causal_unseeing": (lambda: AttentionMask.causal(T, 13), 13),
    "sliding_window": (lambda: AttentionMask.sliding_window(T, left=5, right=2), T),
    "padding": (lambda: AttentionMask.padding(np.array([13, S]), T, S), S),
    "packed": (lambda: AttentionMask.packed(np.repeat([0, 1, -1], [11, 8, 5])[None]), T),
    "unified": (
        lambda: AttentionMask.unified(
            np.repeat([[0, 1, -1]], [12, 9, 3], axis=1),
            np.repeat([[0, 1, -1, 2, 3, -1]], [5, 5, 2, 3, 3, 6], axis=1),
            np.repeat([[True, False, True, False]], [5, 7, 3, 9], axis=1),  # key 0, of all keys, is private
        ),
        T,
    ),
}


def attention(name, *, heads=4):
    """Inputs with two query heads a key head, under a mask."""
    make, length = MASKS[name]
    keys = jax.random.split(jax.random.key(7), 3)
    q = jax.random.normal(keys[0], (2, T, heads, 16))
    k, v = (jax.random.normal(key, (2, length, 2, 16)) for key in keys[1:])
    return q, k, v, None if make is None else make(), None


def reference(arrays):
    """The definition's output and gradients under the cotangent that `timing` draws."""
    function = lambda q, k, v: FLASH_ATTENTION.reference(q, k, v, *arrays[3:], **OPTIONS)
    out, vjp = jax.vjp(function, *arrays[:3])
    return [out, *vjp(timing.cotangent(out))]


def error(got, want):
    return max(float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w)) for g, w in zip(got, want, strict=True))


def floating(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def prepare(peer, pass_, arrays):
    return peers.PEERS["flash_attention"][peer].call(pass_, timing.copies(arrays), **OPTIONS)


def of_peer(peer, pass_, arrays):
    return floating(prepare(peer, pass_, arrays).answer())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("peer", ["xla_default", "tokamax"])
def test_a_jax_peer_gives_the_definitions_answer(peer, mask):
    if peer == "tokamax":
        pytest.importorskip("tokamax")
    arrays = attention(mask)
    assert error(of_peer(peer, "both", arrays), reference(arrays)) < 1e-5


@pytest.mark.parametrize(
    "mask, dense, blind",
    [
        ("none", False, False),
        ("causal", False, False),
        ("causal_longer_keys", True, False),
        ("causal_unseeing", True, True),
        ("sliding_window", True, False),
        ("packed", True, True),
    ],
)
def test_masks_are_made_before_the_clock_starts_and_only_where_needed(mask, dense, blind):
    arrays = attention(mask)
    [copy] = prepare("xla_default", "forward", arrays).copies
    assert (copy[3] is not None, copy[4] is not None) == (dense, blind)
    [copy] = prepare("tokamax", "forward", arrays).copies
    assert (copy[3] is not None, copy[4] is not None, copy[5] is not None) == (dense, False, blind)


def test_tokamax_gets_the_dense_mask_only_for_what_is_private():
    [copy] = prepare("tokamax", "forward", attention("unified")).copies
    assert copy[3] is not None and copy[4] is not None


def test_what_is_missing_is_one_line_that_says_so(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("tokamax", "torch") else found(n, *a))
    arrays = FLASH_ATTENTION.cases["tiny_unified_bf16_h72"].arrays
    reasons = {n: p.unsupported(*arrays, **OPTIONS) for n, p in peers.PEERS["flash_attention"].items()}
    assert reasons == {
        "xla_default": None,
        "tokamax": "needs tokamax: pip install -e '.[peers]'",
        "torch_cudnn": "needs PyTorch with CUDA, which is not installed",
        "torch_flash": "PyTorch's flash attention supports only full and causal masks, got a mask of kind 'unified'",
    }
    rows = {row["implementation"]: row for row in bench.measure(FLASH_ATTENTION, "tiny_unified_bf16_h72", "forward")}
    assert rows["xla_default"]["status"] == "ok"
    for name in ("tokamax", "torch_cudnn", "torch_flash"):
        assert rows[name]["status"] == reasons[name] and "median_us" not in rows[name]


@pytest.mark.parametrize("option", [{"softcap": 3.0}, {"return_lse": True}, {"sinks": jnp.ones(4)}])
def test_options_that_a_peer_lacks_are_refused(option):
    *arrays, sinks = attention("none")
    static = OPTIONS | {name: value for name, value in option.items() if name != "sinks"}
    for name, peer in peers.PEERS["flash_attention"].items():
        reason = peer.unsupported(*arrays, option.get("sinks", sinks), **static)
        assert reason and "\n" not in reason or (name == "tokamax" and "softcap" in option)


def test_peers_are_of_ops_and_bear_no_kernels_name():
    table = {op.name: op for op in OPS}
    for name, of_op in peers.PEERS.items():
        assert not set(of_op) & {"xla", *table[name].kernels}


@pytest.mark.gpu
@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
def test_installed_peers_are_right_on_a_gpu(pass_):
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU")
    rows = {row["implementation"]: row for row in bench.measure(FLASH_ATTENTION, "tiny_unified_bf16_h72", pass_)}
    arrays = FLASH_ATTENTION.cases["tiny_unified_bf16_h72"].arrays
    for name, peer in peers.PEERS["flash_attention"].items():
        if peer.unsupported(*arrays, **OPTIONS) is None:
            assert rows[name]["status"] == "ok"


# PyTorch: the real one where it is installed, else a stand-in that sees what it is asked.


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
def test_pytorch_gives_the_definitions_answer(mask, pass_):
    pytest.importorskip("torch")
    arrays = attention(mask)
    call = attention_peers.torch_call(pass_, timing.copies(arrays), **OPTIONS, backend_name="MATH")
    want = {"forward": slice(1), "backward": slice(1, 4), "both": slice(4)}[pass_]
    assert error(floating(call.answer()), reference(arrays)[want]) < 1e-5


class Tensor:
    """As much of torch.Tensor as the forward needs, over a JAX array."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def transpose(self, a, b):
        return Tensor(jnp.swapaxes(self.array, a, b))

    def masked_fill(self, where, value):
        return Tensor(jnp.where(where.array, value, self.array))

    def detach(self):
        return self

    contiguous = detach

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def stand_in(monkeypatch):
    """A module `torch` whose attention is JAX's own; what it was asked is in `asked`."""
    asked = []

    class Chosen:
        def __init__(self, backend):
            self.backend = backend

        def __enter__(self):
            asked.append({"backend": self.backend})

        def __exit__(self, *_):
            pass

    def attend(q, k, v, *, attn_mask, is_causal, scale, enable_gqa):
        asked[-1] |= {"causal": is_causal, "dense": attn_mask is not None, "grouped": enable_gqa, "scale": scale}
        q, k, v = (jnp.swapaxes(x.array, 1, 2) for x in (q, k, v))
        dense = None if attn_mask is None else attn_mask.array
        out = jax.nn.dot_product_attention(q, k, v, mask=dense, is_causal=is_causal, scale=scale)
        return Tensor(jnp.swapaxes(out, 1, 2))

    torch = types.ModuleType("torch")
    torch.__version__ = "0"
    torch.from_dlpack = Tensor
    torch.no_grad = lambda: lambda function: function
    torch.cuda = types.SimpleNamespace(is_available=lambda: False)
    torch.nn = types.ModuleType("torch.nn")
    torch.nn.functional = types.SimpleNamespace(scaled_dot_product_attention=attend)
    torch.nn.attention = types.ModuleType("torch.nn.attention")
    members = {"CUDNN_ATTENTION": "cudnn", "FLASH_ATTENTION": "flash"}
    torch.nn.attention.SDPBackend = types.SimpleNamespace(__members__=members)
    torch.nn.attention.sdpa_kernel = Chosen
    for name, module in (("torch", torch), ("torch.nn", torch.nn), ("torch.nn.attention", torch.nn.attention)):
        monkeypatch.setitem(sys.modules, name, module)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: torch if n == "torch" else found(n, *a))
    return types.SimpleNamespace(asked=asked, torch=torch)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("peer, backend", [("torch_cudnn", "cudnn"), ("torch_flash", "flash")])
def test_pytorch_is_asked_for_this_attention(stand_in, mask, peer, backend):
    arrays = attention(mask)
    if peer == "torch_flash" and mask not in ("none", "causal"):
        q, *rest = arrays
        assert "only full and causal masks" in peers.PEERS["flash_attention"][peer].unsupported(
            q.astype(jnp.bfloat16), *rest, **OPTIONS
        )
        return
    [got] = of_peer(peer, "forward", arrays)
    assert error([got], reference(arrays)[:1]) < 1e-5
    own_form = mask in ("none", "causal")
    wanted = {"backend": backend, "causal": mask == "causal", "dense": not own_form, "grouped": True, "scale": None}
    assert stand_in.asked == [wanted]


def test_heads_that_are_not_grouped_are_not_said_to_be(stand_in):
    of_peer("torch_cudnn", "forward", attention("none", heads=2))
    assert stand_in.asked[0]["grouped"] is False


def test_pytorch_without_a_gpu_says_so(stand_in, monkeypatch):
    q, *rest = attention("none")
    why = peers.PEERS["flash_attention"]["torch_cudnn"].unsupported
    assert why(q, *rest, **OPTIONS) == "PyTorch's kernels need bfloat16 or float16, got float32"
    q = q.astype(jnp.bfloat16)
    assert why(q, *rest, **OPTIONS) == "PyTorch is timed on an NVIDIA GPU, got cpu"
    monkeypatch.setattr(attention_peers.backend, "target", lambda: Target("gpu", "NVIDIA H200", 9.0))
    assert why(q, *rest, **OPTIONS) == "PyTorch 0 sees no CUDA device"
    stand_in.torch.cuda.is_available = lambda: True
    assert why(q, *rest, **OPTIONS) is None


def test_a_query_that_sees_nothing_gets_a_key_and_the_mask_is_else_the_same():
    mask = MASKS["packed"][0]()
    sighted, blind = attention_peers._sighted(mask)
    assert np.flatnonzero(np.asarray(blind)[0]).tolist() == list(range(19, 24))
    assert bool(jnp.all(jnp.any(sighted.dense(), axis=-1)))
    assert bool(jnp.all(jnp.where(blind[:, :, None], mask.dense(), sighted.dense()) == mask.dense()))
    assert attention_peers._sighted(dataclasses.replace(mask, end=mask.start + 1))[1] is None
    sighted, blind = attention_peers._sighted(MASKS["unified"][0]())  # where the key that it would get is private
    assert not bool(jnp.all(jnp.any(sighted.dense(), axis=-1)))
    assert bool(jnp.all(jnp.any(attention_peers._dense(sighted, blind), axis=-1)))
