"""The bridge to PyTorch: PyTorch's own answers and gradients, no copies, and a watch over what a backward needs.

Runs wherever PyTorch is installed, on what JAX runs on.
"""

import contextlib
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import FLASH_ATTENTION, AttentionMask, backend, flash_attention


torch = pytest.importorskip("torch")
F = torch.nn.functional

from kernels_pallas.torch import functions as kernels  # noqa: E402


DEVICE = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
ATTENTION = dict(B=2, T=48, N=4, K=2, H=16)


def ours():
    """Under which our kernels run: on a CPU interpreted."""
    return backend.interpret_mode() if DEVICE == "cpu" else contextlib.nullcontext()


def normal(*shape, seed=0, dtype=torch.float32):
    """A leaf that wants its gradient."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype).requires_grad_()


def queries(dtype=torch.float32):
    B, T, N, K, H = ATTENTION.values()
    return (
        normal(B, T, N, H, dtype=dtype),
        normal(B, T, K, H, seed=1, dtype=dtype),
        normal(B, T, K, H, seed=2, dtype=dtype),
    )


def torch_attention(q, k, v, *, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def torch_norm(x, scale, shift, weight):
    return F.layer_norm(x, x.shape[-1:], weight, eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def torch_experts(x, index, weight, w_gate_up, w_down):
    out = torch.zeros_like(x)
    for e in range(len(w_down)):
        gate, up = (x @ w_gate_up[e]).chunk(2, -1)
        counts = (weight * (index == e)).sum(-1, keepdim=True)
        out = out + counts * ((F.silu(gate) * up) @ w_down[e])
    return out


def experts(T=24, D=16, E=4, k=2):
    index = torch.rand(T, E, generator=torch.Generator().manual_seed(5)).topk(k).indices.to(DEVICE)
    return [normal(T, D), index, normal(T, k, seed=1), normal(E, D, 2 * 32, seed=2), normal(E, 32, D, seed=3)]


def gradients(out, inputs, d_out):
    wanted = [x for x in inputs if x.is_floating_point()]
    return torch.autograd.grad(out, wanted, d_out)


def agree(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        largest = b.float().abs().max().item()
        assert torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * max(largest, 1)), (a - b).abs().max()


CASES = {
    "flash_attention": (lambda: queries(), kernels.flash_attention, torch_attention),
    "flash_attention, causal": (
        lambda: queries(),
        functools.partial(kernels.flash_attention, mask=AttentionMask.causal(ATTENTION["T"])),
        functools.partial(torch_attention, causal=True),
    ),
    "modulated_norm": (
        lambda: [normal(2, 24, 32), normal(2, 32, seed=1), normal(2, 32, seed=2), normal(32, seed=3)],
        lambda x, scale, shift, weight: kernels.modulated_norm(x, scale, shift, weight=weight),
        torch_norm,
    ),
    "expert_mlp": (experts, kernels.expert_mlp, torch_experts),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_and_gradients_are_pytorchs(name):
    draw, ours, theirs = CASES[name]
    inputs = draw()
    out, wanted = ours(*inputs), theirs(*inputs)
    d_out = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    agree([out], [wanted])
    agree(gradients(out, inputs, d_out), gradients(wanted, inputs, d_out))


def test_bfloat16_stays_bfloat16():
    inputs = queries(torch.bfloat16)
    out, wanted = kernels.flash_attention(*inputs), torch_attention(*inputs)
    agree([out], [wanted], 2e-2)
    agree(gradients(out, inputs, out.detach()), gradients(wanted, inputs, out.detach()), 3e-2)


def test_our_kernels_run_on_tensors():
    """On a CPU interpreted, the only case that sees residuals of a kernel there."""
    inputs, d_out = queries(), normal(2, 48, 4, 16, seed=4).detach()
    with ours():
        out, lse = kernels.flash_attention(*inputs, implementation="triton", return_lse=True)
        found = torch.autograd.grad([out, lse], inputs, [d_out, torch.ones_like(lse)])
    q, k = (x.transpose(1, 2).repeat_interleave(4 // x.shape[2], 1) for x in inputs[:2])
    logsumexp = (q @ k.mT / 4).logsumexp(-1).transpose(1, 2)
    wanted = torch_attention(*inputs)
    agree([out, lse], [wanted, logsumexp])
    agree(found, torch.autograd.grad([wanted, logsumexp], inputs, [d_out, torch.ones_like(lse)]))


def test_a_result_that_nothing_uses_counts_for_nothing():
    inputs = queries()
    out, _ = kernels.flash_attention(*inputs, return_lse=True)
    agree(
        gradients(out, inputs, torch.ones_like(out)), gradients(torch_attention(*inputs), inputs, torch.ones_like(out))
    )


def test_tensors_arrays_and_what_a_backward_needs_share_memory():
    inputs = queries()
    array = kernels.to_jax(inputs[0])
    assert array.unsafe_buffer_pointer() == inputs[0].data_ptr()
    with ours():
        out = kernels.flash_attention(*inputs, implementation="triton")
    saved = out.grad_fn.saved_tensors
    pointers = {x.data_ptr() for x in (*inputs, out)}
    assert pointers <= {x.data_ptr() for x in saved}
    assert [tuple(x.shape) for x in saved if x.data_ptr() not in pointers] == [(2, 4, 48)]  # the lse, and no copy


def test_what_a_backward_needed_is_free_after_it():
    inputs = queries()
    with ours():
        out = kernels.flash_attention(*inputs, implementation="triton")
        lse = weakref.ref(next(x for x in out.grad_fn.saved_tensors if x.ndim == 3))
        out.sum().backward()
    gc.collect()
    assert lse() is None and set(out.grad_fn.constants) == {None}
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_only_what_is_wanted_is_differentiated():
    q, k, v = queries()
    frozen = kernels.flash_attention(q, k.detach(), v.detach())
    assert frozen.grad_fn.program.wanted == (0,)
    agree(torch.autograd.grad(frozen.sum(), [q]), torch.autograd.grad(torch_attention(q, k, v).sum(), [q]))


@pytest.mark.skipif("cuda" in DEVICE, reason="there our kernels run")
def test_what_was_interpreted_is_not_what_runs_afterwards():
    inputs = queries()
    with ours():
        kernels.flash_attention(*inputs, implementation="triton")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        kernels.flash_attention(*inputs, implementation="triton")


def test_recomputed_activations_have_the_same_gradients():
    inputs = queries()
    wanted = gradients(kernels.flash_attention(*inputs), inputs, torch.ones_like(inputs[0]))
    again = torch.utils.checkpoint.checkpoint(kernels.flash_attention, *inputs, use_reentrant=False)
    agree(gradients(again, inputs, torch.ones_like(inputs[0])), wanted, 0)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # of PyTorch itself, as it makes the first dual
def test_forward_mode_is_refused_and_not_forgotten():
    x = normal(2, 8, 32).detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            kernels.modulated_norm(dual)
        kernels.modulated_norm(x)


def test_a_tensor_between_words_is_copied(monkeypatch):
    inside = normal(1 + 2 * 24 * 32).detach()[1:].view(2, 24, 32)
    assert inside.data_ptr() % 16
    read, given = kernels.from_dlpack, []
    monkeypatch.setattr(kernels, "from_dlpack", lambda tensors: given.extend(tensors) or read(tensors))
    kernels.to_jax(inside)
    assert [tensor.data_ptr() % 16 for tensor in given] == [0]
    agree([kernels.modulated_norm(inside)], [F.layer_norm(inside, (32,), eps=1e-6)])


def test_memory_of_dropped_results_is_not_overwritten_while_pytorch_reads_it():
    """On a GPU a race: JAX gets a result's memory back when PyTorch drops it, and PyTorch may still be busy with it."""
    q, k, v = (x.detach() for x in queries())
    wanted = torch_attention(q, k, v, causal=True)
    mask, sums = AttentionMask.causal(ATTENTION["T"]), []
    for _ in range(20):
        out = kernels.flash_attention(q, k, v, mask=mask)
        sums.append(out.repeat(8, 1, 1, 1).double().sum((0, 1)))  # PyTorch is at it when out goes
    agree(sums, [8 * wanted.double().sum((0, 1))] * 20, 1e-5)


@pytest.mark.parametrize("changed", ["argument", "result"])
def test_a_backward_after_a_change_in_place_is_refused(changed):
    inputs = queries()
    with ours():
        out = kernels.flash_attention(*inputs, implementation="triton")  # its backward needs its own result
        with torch.no_grad():
            (inputs[1] if changed == "argument" else out).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_layouts_and_integers_of_pytorch_are_taken():
    x = normal(32, 24, 2)
    turned = x.permute(2, 1, 0)
    out = kernels.modulated_norm(turned)
    agree([out], [F.layer_norm(turned, (32,), eps=1e-6)])
    out.sum().backward()  # an expanded gradient
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.abs().max() < 1e-4  # a norm's sum is constant
    inputs = experts()
    assert inputs[1].dtype == torch.int64
    narrow = [inputs[0], inputs[1].int(), *inputs[2:]]
    assert torch.equal(kernels.expert_mlp(*inputs), kernels.expert_mlp(*narrow))


def test_without_gradients_nothing_is_kept(monkeypatch):
    inputs = queries()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(kernels._Differentiable, "apply", None)
        out = kernels.flash_attention(*inputs)
    assert out.grad_fn is None and not out.requires_grad
    agree([out], [kernels.flash_attention(*inputs)], 0)
    assert kernels.flash_attention(*(x.detach() for x in inputs)).grad_fn is None


def test_an_expert_of_no_number_is_none():
    x, index, weight, w_gate_up, w_down = experts()
    index[:, 1] = len(w_down)
    alone = kernels.expert_mlp(x, index[:, :1].contiguous(), weight[:, :1], w_gate_up, w_down)
    agree([kernels.expert_mlp(x, index, weight, w_gate_up, w_down)], [alone], 1e-6)


def test_what_does_not_fit_is_one_line():
    q, k, v = queries()
    with pytest.raises(ValueError, match="float64"):
        kernels.flash_attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="a tensor is on meta, but JAX runs on"):
        kernels.flash_attention(q.to("meta"), k.to("meta"), v.to("meta"))
    with pytest.raises(ValueError, match="one dtype"):
        kernels.flash_attention(q.bfloat16(), k, v)
    x, index, weight, *weights = experts()
    with pytest.raises(ValueError, match=r"give both as \(T, k\)"):
        kernels.expert_mlp(x, index[:, 0], weight, *weights)
    x = normal(1, 8, 16)
    (gradient,) = torch.autograd.grad(kernels.modulated_norm(x).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler, of its own looking at it
def test_a_model_with_our_ops_trains_as_one_without():
    """Five steps of Adam, in a module that torch.compile has been at."""

    def losses(attention, norm):
        torch.manual_seed(0)
        project = torch.nn.Linear(32, 96).to(DEVICE)
        x, target = normal(2, 24, 32).detach(), normal(2, 24, 32, seed=7).detach()
        weight = torch.nn.Parameter(torch.ones(32, device=DEVICE))
        optimizer = torch.optim.Adam([*project.parameters(), weight], 1e-2)
        zero, found = torch.zeros(2, 32, device=DEVICE), []

        @functools.partial(torch.compile, backend="eager")
        def forward():
            qkv = project(norm(x, zero, zero, weight)).view(2, 24, 3, 2, 16)
            return attention(*qkv.unbind(2)).flatten(2)

        for _ in range(5):
            loss = F.mse_loss(forward(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    norm = lambda x, scale, shift, weight: kernels.modulated_norm(x, scale, shift, weight=weight)
    ours, theirs = losses(kernels.flash_attention, norm), losses(torch_attention, torch_norm)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert theirs[-1] < theirs[0]


def test_masks_of_tensors():
    documents = torch.tensor([[0] * 20 + [1] * 28] * 2, device=DEVICE)
    inputs = queries()
    mask = jax.device_put(AttentionMask.packed(kernels.to_jax(documents.int())))
    seen = documents[:, :, None] == documents[:, None, :]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)
    agree([kernels.flash_attention(*inputs, mask=mask)], [wanted])
    assert jnp.asarray(mask.start).dtype == jnp.int32


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in DEVICE, reason="needs an NVIDIA GPU")
def test_a_mosaic_kernel_runs_without_jax():
    """docs/kernels.md, "PyTorch"."""
    q = jnp.zeros((2, 512, 4, 64), jnp.bfloat16)
    options = {"scale": None, "softcap": None, "return_lse": False}
    if reason := FLASH_ATTENTION.kernels["mosaic_gpu"].unsupported(q, q, q, None, None, **options):
        pytest.skip(reason)
    q, k, v = (normal(2, 512, 4, 64, seed=seed, dtype=torch.bfloat16).detach() for seed in range(3))
    native = plgpu.as_torch_kernel(lambda q, k, v: flash_attention(q, k, v, implementation="mosaic_gpu"))
    agree([native(q, k, v)], [torch_attention(q, k, v)], 2e-2)
