"""What an op says its work is, against the arrays that go in and out of its kernel, and XLA's count of its products."""

import functools

import jax
import pytest

from kernels_pallas import (
    CLIP_REDUCE,
    DENSE_MLP,
    GATED_MLP,
    GATED_RESIDUAL_NORM,
    GHOST_NORM_SQ,
    LINEAR_CROSS_ENTROPY,
    MODULATED_NORM,
    QK_NORM_ROPE,
    backend,
)


OPS = {
    op.name: op
    for op in (
        MODULATED_NORM, GATED_RESIDUAL_NORM, QK_NORM_ROPE, GATED_MLP, DENSE_MLP, LINEAR_CROSS_ENTROPY, GHOST_NORM_SQ,
        CLIP_REDUCE,
    )
}  # fmt: skip
TINY = [(name, case) for name, op in OPS.items() for case in op.cases if op.cases[case].tiny]


def traced(name, case, pass_):
    """The jaxpr of a pass of the Triton kernel."""
    case_, kernel = OPS[name].cases[case], OPS[name].kernels["triton"]
    forward = functools.partial(kernel.forward, **case_.static)
    with backend.interpret_mode():
        if pass_ == "forward":
            return jax.make_jaxpr(forward)(*case_.arrays).jaxpr
        out, residuals = jax.eval_shape(forward, *case_.arrays)
        return jax.make_jaxpr(functools.partial(kernel.backward, **case_.static))(residuals, out).jaxpr


def size(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


@pytest.mark.parametrize("name, case", TINY)
def test_every_array_counts_once_forward(name, case):
    """Inputs, outputs, and what is kept for the backward."""
    jaxpr, case_ = traced(name, case, "forward"), OPS[name].cases[case]
    moved = {*jaxpr.invars, *jaxpr.outvars}
    assert OPS[name].cost["forward"](*case_.arrays, **case_.static).bytes == size(v.aval for v in moved)


@pytest.mark.parametrize("name, case", [run for run in TINY if "backward" in OPS[run[0]].passes])
def test_every_array_counts_once_backward(name, case):
    """What was kept and is read, the cotangents, the gradients."""
    jaxpr, case_ = traced(name, case, "backward"), OPS[name].cases[case]
    read = {v for equation in jaxpr.eqns for v in equation.invars if isinstance(v, jax.extend.core.Var)}
    written = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    moved = size(v.aval for v in (read & set(jaxpr.invars)) | written)
    if name == "qk_norm_rope" and case_.arrays[1] is not None:  # of qkv, the values are not read
        moved -= size(case_.arrays[:1]) // case_.arrays[0].shape[3]
    said = OPS[name].cost["backward"](*case_.arrays, **case_.static).bytes
    slack = 0.01 if name == "dense_mlp" else 0  # its count has the biases read, which nobody does
    assert said == pytest.approx(moved, rel=slack)


@pytest.mark.parametrize(
    "name, case, times", [("gated_mlp", "dit_xl_256", 2), ("dense_mlp", "dit_xl_256", 2),
                          ("linear_cross_entropy", "janus_pro_1b", 3)])  # fmt: skip
def test_flops_are_those_of_the_definitions_products(name, case, times):
    """The backward's are twice the forward's, and once more where it computes the logits again."""
    op, case_ = OPS[name], OPS[name].cases[case]
    counted = jax.jit(functools.partial(op.reference, **case_.static)).lower(*case_.arrays).cost_analysis()["flops"]
    forward, backward = (op.cost[p](*case_.arrays, **case_.static).flops for p in ("forward", "backward"))
    assert forward == pytest.approx(counted, rel=0.01)
    assert backward == times * forward


@pytest.mark.parametrize("case", ["dit_xl2_down", "dit_b2_f32", "adaln"])
def test_a_clipped_sums_flops_are_those_of_its_product(case):
    op, case_ = OPS["clip_reduce"], OPS["clip_reduce"].cases[case]
    counted = jax.jit(op.reference).lower(*case_.arrays).cost_analysis()["flops"]
    assert op.cost["forward"](*case_.arrays).flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("case, half", [("dit_xl2_up", True), ("dit_s2_1024_up", False), ("lora_r16", False)])
def test_a_norms_flops_are_those_of_half_its_pairs_or_of_its_matrix(case, half):
    """The definition multiplies all pairs, of which half are enough."""
    op, case_ = OPS["ghost_norm_sq"], OPS["ghost_norm_sq"].cases[case]
    counted = jax.jit(functools.partial(op.reference, **case_.static)).lower(*case_.arrays).cost_analysis()["flops"]
    said = op.cost["forward"](*case_.arrays, **case_.static).flops
    assert said == pytest.approx(counted / (2 if half else 1), rel=0.07)
