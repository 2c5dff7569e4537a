"""Every kernel of every op: right, differentiable in every way it is used, and fit for the chip.

A new kernel needs no line here: the matrix is op x kernel x case of `kernels_pallas.OPS`.

The oracle is the op's reference in float64. A kernel passes when

    max|kernel - oracle| <= 2 max|plain - oracle| + floor

with `plain` the reference at the case's own dtype: FlashAttention's rule, which scales itself to the problem
and leaves no tolerance to tune. The floor is two ulps of the result's dtype at the largest result: four
roundings of half an ulp that plain jnp need not suffer, of the result to the other side, of an operand
(probabilities, say) that the tensor cores want narrow, and of the two things (output, statistics) that a
backward reads back. On the chip float32 results have more: tensor cores cut what they add to an accumulator (a unit in
its last place for each step of 16 products, always toward zero), and plain cores add one product at a time, where XLA
adds pairwise. No sum here is longer than the longest side of the op's arrays.
"""

import functools
import inspect
import re
from typing import get_args
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas import primitives
from jax.experimental import pallas as pl

import kernels_pallas
from kernels_pallas import backend, hardware, measured
from kernels_pallas.op import Case


OPS = {op.name: op for op in kernels_pallas.OPS}
ANYONES = [(op.name, kernel, case) for op in OPS.values() for kernel in op.kernels for case in op.cases]
EVERY = [run for run in ANYONES if not OPS[run[0]].kernels[run[1]].external]
TRITON = [run for run in EVERY if run[1] == "triton"]


def refusal(name, kernel, case):
    case_ = OPS[name].cases[case]
    return OPS[name].kernels[kernel].unsupported(*case_.arrays, **case_.static)


# What JAX's interpreter can check. For a kernel that it cannot, a file of its own teaches it to, as far as that goes.
INTERPRETED = [run for run in EVERY if not OPS[run[0]].kernels[run[1]].needs_gpu_proof]
with backend.interpret_mode():
    TINY = [run for run in INTERPRETED if OPS[run[0]].cases[run[2]].tiny and not refusal(*run)]


def recorded(name):
    """The mark of a test of one op: it depends on the op's family."""
    return pytest.mark.recorded(f"kernels_pallas/{measured.family(OPS[name]).name}", "kernels_pallas/csrc")


def every(runs):
    """One test for each op, kernel and case."""
    params = [pytest.param(*run, id="-".join(run), marks=recorded(run[0])) for run in runs]
    return pytest.mark.parametrize("name, kernel, case", params)


def every_pass(runs):
    """The same, for each of its passes."""
    runs = [(*run, pass_) for run in runs for pass_ in OPS[run[0]].passes]
    params = [pytest.param(*run, id="-".join(run), marks=recorded(run[0])) for run in runs]
    return pytest.mark.parametrize("name, kernel, case, pass_", params)


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def inputs(name, case, seed=0):
    """The case's arrays, its own random ones, and a random cotangent for each output of what has a backward."""
    op, case_ = OPS[name], OPS[name].cases[case]
    key, key_out = jax.random.split(jax.random.key(list(op.cases).index(case) + 1000 * seed))
    arrays = case_.random(key) if case_.make else jax.jit(case_.random)(key)
    if "backward" not in op.passes:
        return arrays, ()
    outs = jax.eval_shape(functools.partial(op.reference, **case_.static), *case_.arrays)
    leaves, tree = jax.tree.flatten(outs)
    return arrays, jax.tree.unflatten(tree, jax.jit(Case(tuple(leaves)).random)(key_out))


def passes(name, function):
    """(arrays, d_out) -> outputs and, of an op that has a backward, cotangents without those of integer inputs."""

    def run(arrays, d_out):
        if "backward" not in OPS[name].passes:
            return jax.tree.leaves(function(*arrays))
        out, vjp = jax.vjp(function, *arrays)
        gradients = [g for g in jax.tree.leaves(vjp(d_out)) if g.dtype != jax.dtypes.float0]
        return [*jax.tree.leaves(out), *gradients]

    return run


def implementation(name, kernel, case):
    return functools.partial(OPS[name], implementation=kernel, **OPS[name].cases[case].static)


def interpreter(function, *arguments):
    """Compiles it in interpret mode; unoptimised, as the compiler takes longer than the two or three runs."""
    options = {"xla_backend_optimization_level": 0}
    with (
        backend.interpret_mode(),
        mock.patch.object(primitives, "_unpad_values_to_avoid_dynamic_slice_oob_shift", _unpad_or_spoil),
    ):
        return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def _unpad_or_spoil(value, sizes):
    """Ends a store in interpret mode, for which JAX pads the array with NaN and forgets what was put there.

    On the chip a store past the edge lands in a neighbour. Here it spoils the whole array.
    """
    inside = value[tuple(slice(0, n - size) for n, size in zip(value.shape, sizes, strict=True))]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return inside
    past = jnp.pad(jnp.zeros(inside.shape, bool), [(0, size) for size in sizes], constant_values=True)
    return jnp.where(jnp.any(past & ~jnp.isnan(value)), jnp.array(jnp.nan, value.dtype), inside)


@functools.cache
def interpreted(name, kernel, case):
    """Outputs and cotangents of the whole batch, as a function of `inputs`."""
    run = passes(name, implementation(name, kernel, case))
    return interpreter(run, *inputs(name, case))


@functools.cache
def plain_and_oracle(name, case, seed=0):
    """The reference at the case's dtype, and in float64 throughout."""
    run = jax.jit(passes(name, implementation(name, "xla", case))).lower(*inputs(name, case, seed))
    # On a GPU XLA leaves out roundings between float32 operations that the definition has.
    plain = run.compile(compiler_options={"xla_allow_excess_precision": False})(*inputs(name, case, seed))
    # A reference says float32 where it means "wide"; here that is float64.
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        run = passes(name, functools.partial(OPS[name].reference, **OPS[name].cases[case].static))
        widened = jax.tree.map(_widened, inputs(name, case, seed))
        traced = jax.jit(run).trace(*widened)
        assert not re.search(r"\bb?f(16|32)\[", str(traced.jaxpr)), "the oracle must be float64 throughout"
        return plain, [np.asarray(x) for x in traced.lower().compile()(*widened)]


def _widened(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def assert_as_good_as_plain(name, case, got, seed=0, longest_sum=0):
    """The rule at the head of this file; NaN fails it. `longest_sum`: of products, where a chip adds them."""
    plain, oracle = plain_and_oracle(name, case, seed)
    assert len(got) == len(plain) == len(oracle)
    for i, (mine, theirs, truth) in enumerate(zip(got, plain, oracle, strict=True)):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), f"result {i}"
        # What is zero for all inputs has no size of its own: it is a difference of terms of the others' size.
        largest = _largest(truth) or max(_largest(other) for other in oracle)
        error, plain_error = (_error(x, truth) for x in (mine, theirs))
        ulps = 2 + (longest_sum / 16 if mine.dtype == np.float32 else 0)
        allowed = 2 * plain_error + ulps * float(jnp.finfo(mine.dtype).eps) * largest
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


def _error(x, truth) -> float:
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x == truth, 0, np.abs(x - truth)).max()  # infinities may agree


def _largest(x) -> float:
    return np.abs(np.where(np.isfinite(x), x, 0)).max()


def assert_same_bits(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


def batched(name, case) -> list[bool]:
    """For each leaf of the case's arrays, whether its first dimension is the batch, by the reference's annotation.

    An array in a tree is one example's where it has a row for each; one row serves all. Without a B in the first
    annotation there is no batch.
    """
    parameters = inspect.signature(OPS[name].reference).parameters.values()
    positional = [p for p in parameters if p.kind != p.KEYWORD_ONLY]
    arrays = OPS[name].cases[case].arrays
    if not positional[0].annotation.dim_str.startswith("B"):
        return [False] * len(jax.tree.leaves(arrays))
    batch = jax.tree.leaves(arrays)[0].shape[0]
    flags = []
    for parameter, array in zip(positional, arrays, strict=True):
        dims = [a.dim_str for a in (parameter.annotation, *get_args(parameter.annotation)) if hasattr(a, "dim_str")]
        rows = [leaf.shape[0] == batch > 1 for leaf in jax.tree.leaves(array)]
        flags += [dims[0].split()[0] == "B"] * len(rows) if dims else rows
    return flags


def of_leaves(name, case, function):
    """`function` of the leaves of its arrays instead."""
    tree = jax.tree.structure(OPS[name].cases[case].arrays)
    return lambda *leaves: function(*jax.tree.unflatten(tree, leaves))


def asks_for(name, kernel, case) -> tuple:
    """What decides how a case goes through JAX's transformations: which arrays and options there are, not their sizes.

    The few cases that run other kernels than their likes for their size alone say so by their name.
    """
    case_ = OPS[name].cases[case]
    options = tuple(sorted(key for key, value in case_.static.items() if value not in (None, False)))
    by_size = next((word for word in ("split", "halves", "groups", "many", "one") if word in case), "")
    return name, kernel, jax.tree.structure(case_.arrays), options, tuple(batched(name, case)), by_size


# One case of each kind: a transformation is a property of what a kernel is called with, not of the sizes.
KINDS = list({asks_for(*run): run for run in reversed(TINY)}.values())
BATCHED = [run for run in KINDS if any(batched(run[0], run[2]))]


# Right, on a CPU.


@every(TINY)
def test_agrees_with_the_reference(name, kernel, case):
    assert_as_good_as_plain(name, case, interpreted(name, kernel, case)(*inputs(name, case)))


@every(TINY)
def test_two_runs_agree_to_the_bit(name, kernel, case):
    run = interpreted(name, kernel, case)
    assert_same_bits(run(*inputs(name, case)), run(*inputs(name, case)))


@every(BATCHED)
def test_gradient_of_each_example(name, kernel, case):
    """vmap of the gradient through remat, as private training does: the batch's own; of what is shared, its terms."""
    flags = batched(name, case)
    run = passes(name, of_leaves(name, case, jax.remat(implementation(name, kernel, case))))

    def one(arrays, d_out):
        arrays = [a[None] if b else a for a, b in zip(arrays, flags, strict=True)]
        return run(arrays, jax.tree.map(lambda d: d[None], d_out))

    arrays, d_out = jax.tree.leaves(inputs(name, case)[0]), inputs(name, case)[1]
    got = interpreter(jax.vmap(one, in_axes=([0 if b else None for b in flags], 0)), arrays, d_out)(arrays, d_out)
    shapes = [r.shape for r in plain_and_oracle(name, case)[0]]
    got = [g[:, 0] if g[:, 0].shape == shape else g.sum(axis=0) for g, shape in zip(got, shapes, strict=True)]
    assert_as_good_as_plain(name, case, got)


@every([run for run in KINDS if run not in BATCHED])
def test_gradient_of_two_problems_at_once(name, kernel, case):
    """vmap, through remat, of what has no batch of its own: of both, each with its own numbers."""
    pair = jax.tree.map(lambda *both: jnp.stack(both), *(inputs(name, case, seed) for seed in (0, 1)))
    run = interpreter(jax.vmap(passes(name, jax.remat(implementation(name, kernel, case)))), *pair)
    for seed in (0, 1):
        assert_as_good_as_plain(name, case, [got[seed] for got in run(*pair)], seed)


@every(BATCHED)
def test_shards_by_example_without_communication(name, kernel, case):
    """A raw custom call under a sharded mesh makes XLA gather its inputs; under shard_map it does not."""
    arrays, d_out = jax.tree.leaves(inputs(name, case)[0]), inputs(name, case)[1]
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("data",))
    specs = [jax.P("data") if b else jax.P() for b in batched(name, case)]
    function = jax.shard_map(
        of_leaves(name, case, implementation(name, kernel, case)),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=jax.P("data"),
        check_vma=False,
    )

    def place(x, spec):
        copies = np.tile(x, (8, *(1,) * (x.ndim - 1))) if spec == jax.P("data") else x
        return jax.device_put(copies, jax.sharding.NamedSharding(mesh, spec))

    placed = (
        [place(a, s) for a, s in zip(arrays, specs, strict=True)],
        jax.tree.map(lambda d: place(d, jax.P("data")), d_out),
    )
    run = interpreter(passes(name, function), *placed)
    shapes = [r.shape for r in plain_and_oracle(name, case)[0]]
    got = [g / 8 if g.shape == shape else g[: shape[0]] for g, shape in zip(run(*placed), shapes, strict=True)]
    assert_as_good_as_plain(name, case, got)
    assert run.as_text().count("all-gather") == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=recorded(name)) for name in OPS])
def test_transformations_are_tried_with_every_kernel(name):
    """Each GPU function that a case runs is run by one of KINDS."""
    of = [run for run in TINY if run[0] == name and run in ON_H200]
    called = {run: {call.params["name"] for p in OPS[name].passes for call in pallas_calls(*run, p)} for run in of}
    assert set().union(*called.values()) == set().union(*(called[run] for run in of if run in KINDS))


def test_interpret_mode_poisons_what_a_kernel_leaves_unwritten():
    """Else a kernel that forgets an element could pass on a lucky zero."""

    def half(out_ref):
        out_ref[:4] = jnp.ones(4)

    out = pl.pallas_call(half, out_shape=jax.ShapeDtypeStruct((8,), jnp.float32), interpret=True)()
    np.testing.assert_array_equal(np.isnan(out), [False] * 4 + [True] * 4)


# Fit for the chip, without one.


@functools.cache
def traced(name, kernel, case, pass_):
    """One pass as JAX traces it for an H200."""
    case_, kernel_ = OPS[name].cases[case], OPS[name].kernels[kernel]
    forward = functools.partial(kernel_.forward, **case_.static)
    with jax.sharding.use_abstract_mesh(H200):
        if pass_ == "forward":
            return jax.jit(forward).trace(*case_.arrays)
        out, residuals = jax.eval_shape(forward, *case_.arrays)
        return jax.jit(functools.partial(kernel_.backward, **case_.static)).trace(residuals, out)


def abstract(gpu: hardware.Hardware) -> jax.sharding.AbstractMesh:
    """A mesh that says which GPU is meant."""
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, platform="gpu", num_cores=gpu.cores)
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


H200 = abstract(hardware.H200)
with jax.sharding.use_abstract_mesh(H200):
    ON_H200 = [run for run in EVERY if not refusal(*run)]


@every_pass(ON_H200)
def test_lowers_for_cuda(name, kernel, case, pass_):
    """Catches what Triton cannot say, tiles that are no power of two and, as a warning, old names."""
    with jax.sharding.use_abstract_mesh(H200):
        text = traced(name, kernel, case, pass_).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{name}_{pass_}" in text


def equations(jaxpr, *primitives):
    """Those of `primitives`, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in primitives:
            yield equation
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(inner, *primitives)


def pallas_calls(*run):
    calls = list(equations(traced(*run).jaxpr.jaxpr, "pallas_call"))
    assert calls, "no Pallas kernel in this pass"
    return calls


@every_pass(TRITON)
def test_no_access_hangs_over_an_edge(name, kernel, case, pass_):
    """JAX 0.11 masks no partial block on the chip, and interpret mode pads it: neither would tell."""
    for call in pallas_calls(name, kernel, case, pass_):
        for mapping in call.params["grid_mapping"].block_mappings:
            blocks = [getattr(b, "block_size", b) for b in mapping.block_shape]
            for block, size in zip(blocks, mapping.array_aval.shape, strict=True):
                assert not isinstance(block, int) or size % block == 0, (mapping.origin, block, size)
        for access in equations(call.params["jaxpr"], "masked_load", "masked_swap", "get", "swap"):
            sizes, indices, mask = _access(access)
            hanging = [i for i, size in zip(indices, sizes, strict=True) if _hangs(i, size)]
            assert mask is not None or not hanging, (access, hanging)


def _access(equation):
    """Of a load or store: the shape it goes into, its index, and its mask; a plain `ref[...]` has none."""
    if "args_tree" in equation.params:
        _, transforms, *rest = equation.params["args_tree"].unflatten(equation.invars)
        mask = rest[0] if equation.primitive.name == "masked_load" else rest[1]
    else:
        index = equation.invars[1 if equation.primitive.name == "get" else 2 :]
        transforms, mask = equation.params["tree"].unflatten(index), None
    return (transforms[-1].shape, transforms[-1].indices, mask) if transforms else ((), (), mask)


def _hangs(index, size) -> bool:
    """Whether an index may reach past `size`: a slice that starts anywhere may, unless it divides it."""
    if not hasattr(index, "start"):
        return False
    start = getattr(index.start, "val", index.start)
    return size % index.size != 0 if isinstance(start, jax.extend.core.Var) else start + index.size > size


@every_pass(TRITON)
def test_kernels_say_what_they_are(name, kernel, case, pass_):
    """Profiles find them by name, XLA's scheduler by cost; two grid dimensions leave vmap one of three."""
    for call in pallas_calls(name, kernel, case, pass_):
        assert call.params["name"].startswith(f"{name}_{pass_}")
        assert len(call.params["grid_mapping"].grid) <= 2
        assert call.params["cost_estimate"] is not None and call.params["cost_estimate"].bytes_accessed > 0


# Picked by name.


@pytest.mark.parametrize("name", OPS)
def test_unknown_implementation_names_the_choices(name):
    case = next(iter(OPS[name].cases.values()))
    with pytest.raises(ValueError, match=f"{name}: no implementation='cuda'; choose from xla, "):
        OPS[name](*case.arrays, implementation="cuda", **case.static)


@every([(name, "triton", next(iter(op.cases))) for name, op in OPS.items() if "triton" in op.kernels])
def test_what_cannot_run_says_why_and_what_can(name, kernel, case):
    wanted = (
        rf"{name}: implementation='triton' cannot run here: needs an NVIDIA GPU, got cpu.*choose from: (ffi, )?xla\."
    )
    arrays, _ = inputs(name, case)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(NotImplementedError, match=wanted),
    ):
        implementation(name, kernel, case)(*arrays)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "ffi" not in op.kernels])  # which CPUs run
def test_left_to_choose_a_cpu_runs_the_reference(name):
    case = next(case for case, c in OPS[name].cases.items() if c.tiny)
    arrays, _ = inputs(name, case)
    got, want = (jax.make_jaxpr(implementation(name, i, case))(*arrays) for i in (None, "xla"))
    assert str(got) == str(want)


# On the chip.


@pytest.mark.gpu
@every([run for run in ANYONES if run[1] != "ffi" and not OPS[run[0]].cases[run[2]].huge])  # test_custom_calls.py
def test_agrees_on_the_gpu(name, kernel, case):
    """The same rule, the oracle computed on the same GPU; and two runs agree to the bit."""
    if jax.devices()[0].platform != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, got {jax.devices()[0].device_kind}")
    if reason := refusal(name, kernel, case):
        pytest.skip(reason)
    run = jax.jit(passes(name, implementation(name, kernel, case)))
    got = run(*inputs(name, case))
    if not OPS[name].kernels[kernel].external:
        assert_same_bits(got, run(*inputs(name, case)))
    longest = max(side for array in jax.tree.leaves(inputs(name, case)[0]) for side in array.shape)
    assert_as_good_as_plain(name, case, got, longest_sum=longest)
