"""The Hopper kernels of attention, without a Hopper GPU: arithmetic, copies, lowering and machine code.

JAX 0.11's interpreter knows no product with a left operand in registers and no `pl.run_state`; `taught` below adds
the two, so that what is interpreted is the kernel that ships. It keeps the rule at the head of
test_ops.py. Its race detector sees copies and plain loads and stores; a product reads shared memory at once, unseen.
"""

import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import core
from jax._src.pallas.mosaic_gpu import core as gpu_core, primitives as gpu
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    shared_memory,
)
from jax._src.state import discharge
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, deviceless, flash_attention, hardware
from kernels_pallas.attention import mosaic_gpu, mosaic_gpu_backward
from kernels_pallas.attention.mask import AttentionMask
from kernels_pallas.attention.reference import flash_attention as reference
from kernels_pallas.op import Kernel, differentiable


pytestmark = pytest.mark.recorded


KERNEL = Kernel(mosaic_gpu.forward, mosaic_gpu_backward.backward, mosaic_gpu.unsupported)
Interpreter = jaxpr_interpret.JaxprInterpreter
INTERPRET = Interpreter.interpret


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def taught():
    """Interpret mode that can do what these kernels do, and forgets the errors of an interpretation before."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with backend.interpret_mode(), mock.patch.object(Interpreter, "interpret", _interpret):
        yield


def _interpret(self, jaxpr, token, *args):
    """JAX's own, an equation at a time, but for values in registers, which it is given as buffers."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))
    read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
    for eqn in jaxpr.eqns:
        where = {"mesh_location": self.mesh_location, "thread": self.thread, "source_info": eqn.source_info}
        invals = [read(x) for x in eqn.invars]
        if eqn.primitive is discharge.run_state_p:
            kept = [isinstance(x.aval, core.ShapedArray) for x in eqn.outvars]
            inner = list(invals)
            for i in np.flatnonzero(kept):
                token, inner[i] = _to_registers(self, token, invals[i], where)
            token, _ = _interpret(self, eqn.params["jaxpr"], token, *inner)
            outs = list(invals)
            for i in np.flatnonzero(kept):
                key = {"allocation_key_as_array": inner[i], **where}
                wanted = {"result_shape_and_dtype": eqn.outvars[i].aval, "transforms": ()}
                token, outs[i] = gpu_callbacks.call_get(token=token, **wanted, **key)
                token = gpu_callbacks.call_deallocate_buffer(token=token, **key)
        elif eqn.primitive is gpu.wgmma_ref_p and isinstance(eqn.invars[1].aval, core.ShapedArray):
            token, key = _to_registers(self, token, invals[1], where)
            operands = [invals[0], key, *invals[2:]]
            token, outs = self._interpret_wgmma_ref_p(eqn, token, functools.partial(list, operands))
            token = gpu_callbacks.call_deallocate_buffer(token=token, allocation_key_as_array=key, **where)
        else:
            variables = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal)))
            alone = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
            token, outs = INTERPRET(self, alone, token, *[values[x] for x in variables])
        values.update(zip(eqn.outvars, outs, strict=True))
    return token, [read(x) for x in jaxpr.outvars]


def _to_registers(self, token, value, where):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        initial_ref_count=1,
        memory_space_id=shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
    )
    arguments = {"allocation_request_as_array": request, "value": value, **where}
    return gpu_callbacks.call_allocate_buffer(token=token, **arguments)


def run_interpreted(function, *arguments):
    """Unoptimised, as the compiler takes longer than the run."""
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    return jax.block_until_ready(compiled(*arguments))


def races() -> bool:
    return interpret_pallas_call.get_races().races_found


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, a mask of (T, S), and options."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    mask: str | None = None
    sinks: bool = False
    softcap: float | None = None
    return_lse: bool = False
    dtype: str = "bfloat16"

    @property
    def options(self):
        return {"scale": None, "softcap": self.softcap, "return_lse": self.return_lse}

    def attention_mask(self) -> Any:
        T, S = self.T, self.S
        match self.mask:
            case "causal":
                return AttentionMask.causal(T, S)
            case "window":
                return AttentionMask.sliding_window(T, S, left=70, right=5)
            case "padding":
                return AttentionMask.padding(np.array([S, S // 3]), T, S)
            case "private":
                numbers = lambda n: (np.arange(n, dtype=np.int32)[None] // 30) % 3
                return dataclasses.replace(AttentionMask.causal(T, S), q_private=numbers(T), k_private=numbers(S))

    def inputs(self):
        """q, k, v, sinks, and a cotangent for each output."""
        keys = jax.random.split(jax.random.key(7), 6)
        normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.float32)
        queries, key_values = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        shapes = (queries, key_values, key_values, queries)
        q, k, v, d_out = (normal(i, *shape).astype(self.dtype) for i, shape in enumerate(shapes))
        sinks = normal(4, self.N).astype(self.dtype) if self.sinks else None
        return (q, k, v, sinks), (d_out, normal(5, *queries[:3])) if self.return_lse else d_out

    def passes(self, attention):
        """(q, k, v, sinks), d_out -> outputs and gradients."""
        mask = self.attention_mask()

        def run(arrays, d_out):
            out, vjp = jax.vjp(lambda q, k, v, sinks: attention(q, k, v, mask, sinks), *arrays)
            return [*jax.tree.leaves(out), *jax.tree.leaves(vjp(d_out))]

        return run


PROBLEMS = {
    "h64": Problem(1, 136, 80, 2, 2, 64),
    "h64_more_tiles_than_slots": Problem(1, 320, 600, 1, 1, 64, "causal"),
    "h64_padding_float16": Problem(2, 77, 77, 1, 1, 64, "padding", dtype="float16"),
    "h72_unseeing_private_grouped": Problem(1, 77, 40, 2, 1, 72, "private"),
    "h80_one_query": Problem(1, 1, 77, 1, 1, 80),
    "h96_all_options": Problem(1, 100, 140, 2, 1, 96, "window", sinks=True, softcap=3.0, return_lse=True),
    "h128_grouped": Problem(1, 150, 200, 2, 1, 128, "causal", return_lse=True),
    "h128_whole_tiles": Problem(1, 256, 256, 2, 1, 128),
    "h256_private": Problem(1, 100, 150, 2, 1, 256, "private"),
}


@functools.cache
def interpreted(name):
    problem = PROBLEMS[name]
    with taught():
        run = problem.passes(differentiable(KERNEL, **problem.options))
        return run_interpreted(run, *problem.inputs()), races()


def assert_as_good_as_plain(problem, got):
    run = jax.jit(problem.passes(functools.partial(reference, **problem.options)))
    arrays, d_out = problem.inputs()
    plain = run(arrays, d_out)
    # The reference says float32 where it means "wide"; here that is float64.
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        wide = jax.jit(problem.passes(functools.partial(reference, **problem.options)))
        oracle = wide(*jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, d_out)))
    assert len(got) == len(plain)
    for i, (mine, theirs, truth) in enumerate(zip(got, plain, oracle, strict=True)):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), f"result {i}"
        mine, theirs, truth = (np.asarray(x, np.float64) for x in (mine, theirs, truth))
        error, plain_error = (np.where(x == truth, 0, np.abs(x - truth)).max() for x in (mine, theirs))
        eps = float(jnp.finfo(got[i].dtype).eps)
        allowed = 2 * plain_error + 2 * eps * np.abs(np.where(np.isfinite(truth), truth, 0)).max()
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_reference_both_ways(name):
    assert_as_good_as_plain(PROBLEMS[name], interpreted(name)[0])


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_copy_races(name):
    assert not interpreted(name)[1]


def test_two_runs_agree_to_the_bit():
    again = interpreted.__wrapped__("h128_grouped")[0]
    for mine, theirs in zip(interpreted("h128_grouped")[0], again, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_missing_fence_is_a_race():
    """Else the test above could pass because the detector sleeps."""
    problem = Problem(1, 320, 64, 1, 1, 64)
    with taught(), mock.patch.object(plgpu, "commit_smem", lambda: None):
        run = problem.passes(differentiable(KERNEL, **problem.options))
        run_interpreted(run, *problem.inputs())
        assert races()


def test_gradient_of_each_example():
    """vmap of the gradient, as private training takes it."""
    problem = Problem(2, 40, 50, 1, 1, 64, "padding")
    (q, k, v, _), d_out = problem.inputs()
    mask = problem.attention_mask()

    def one(q, k, v, start, end, d_out):
        own = dataclasses.replace(mask, start=start[None], end=end[None])
        attention = differentiable(KERNEL, **problem.options)
        out, vjp = jax.vjp(lambda *arrays: attention(*arrays, own, None), q[None], k[None], v[None])
        return [x[0] for x in (out, *vjp(d_out[None]))]

    with taught():
        got = run_interpreted(jax.vmap(one), q, k, v, jnp.asarray(mask.start), mask.end, d_out)
        assert not races()
    assert_as_good_as_plain(problem, got)


@pytest.mark.parametrize(
    "problem, device, reason",
    [
        (Problem(1, 64, 64, 1, 1, 64, dtype="float32"), hardware.H200, "dtype"),
        (Problem(1, 64, 64, 1, 1, 88), hardware.H200, "head width"),
        (Problem(1, 64, 64, 1, 1, 64), hardware.A100, "Hopper"),
        (Problem(1, 64, 64, 1, 1, 64), hardware.H200, None),
    ],
)
def test_says_why_not(problem, device, reason):
    (q, k, v, sinks), _ = problem.inputs()
    with jax.sharding.use_abstract_mesh(abstract(device)):
        said = KERNEL.unsupported(q, k, v, None, sinks, **problem.options)
    assert said is None if reason is None else reason in said


def abstract(gpu_: hardware.Hardware) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=gpu_.device_kind, platform="gpu", num_cores=gpu_.cores)
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


@pytest.mark.parametrize("width", mosaic_gpu.WIDTHS)
def test_lowers_for_cuda(width):
    problem = Problem(2, 300, 700, 4, 2, width, "private", sinks=True, softcap=9.0, return_lse=True)
    run = jax.jit(problem.passes(differentiable(KERNEL, **problem.options)))
    with jax.sharding.use_abstract_mesh(abstract(hardware.H200)):
        text = run.trace(*jax.eval_shape(problem.inputs)).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("flash_attention_forward", "flash_attention_backward_dq", "flash_attention_backward_dkv"):
        assert name in text


@pytest.mark.parametrize(
    "width, length, alone", [(64, 512, True), (128, 1024, True), (72, 512, False), (64, 500, False)]
)
def test_one_kernel_is_all_of_it(width, length, alone):
    """What PyTorch can run by itself (plgpu.as_torch_kernel): docs/kernels.md says when."""
    q = jax.ShapeDtypeStruct((2, length, 4, width), jnp.bfloat16)
    run = jax.jit(lambda q, k, v: flash_attention(q, k, v, implementation="mosaic_gpu"))
    with jax.sharding.use_abstract_mesh(abstract(hardware.H200)):
        text = run.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    operations = re.findall(r"stablehlo[.](\w+)", text)
    assert (operations == ["custom_call"]) == alone and "mosaic_gpu_v2" in text


@pytest.mark.deviceless
def test_remat_and_shards_by_example_without_communication():
    """On eight GPUs that are not there; the interpreter can do neither."""
    if reason := deviceless.why_not():
        pytest.skip(reason)
    mesh = jax.sharding.Mesh(deviceless.devices("h200", 8), ("data",))
    problem = Problem(8, 256, 256, 2, 1, 72, "causal")
    spec = jax.P("data")
    attention = lambda q, k, v, mask, sinks: jax.shard_map(
        jax.remat(lambda q, k, v: differentiable(KERNEL, **problem.options)(q, k, v, mask, sinks)),
        mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False,
    )(q, k, v)  # fmt: skip
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, spec)
        run = jax.jit(problem.passes(attention), in_shardings=sharding, out_shardings=sharding)
        text = run.lower(*jax.eval_shape(problem.inputs)).compile().as_text()
    assert "all-gather" not in text
    assert text.count("mosaic_gpu") >= 4  # forward, forward again, and the two of the backward


COMPILE = """
import json, os, re, sys
from pathlib import Path
folder = sys.argv[1]
os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
import jax
from kernels_pallas import deviceless
from kernels_pallas.op import differentiable
from test_mosaic_gpu import KERNEL, Problem
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
mesh, rows = deviceless.mesh("h200"), []
for width, mask in json.loads(sys.argv[2]):
    problem = Problem(2, 512, 768, 4, 2, width, mask)
    run = problem.passes(differentiable(KERNEL, **problem.options))
    with jax.set_mesh(mesh):
        jitted = jax.jit(run, in_shardings=jax.sharding.NamedSharding(mesh, jax.P()))
        jitted.lower(*jax.eval_shape(problem.inputs)).compile()
    for log in Path(folder).glob("*.ptxas"):
        text, ptx = log.read_text(), log.with_suffix(".ptx").read_text()
        rows.append({
            "width": width, "mask": mask, "function": re.findall(r"[.]entry (\\w+)", ptx)[0],
            "spills": sum(map(int, re.findall(r"(\\d+) bytes spill", text))),
            "wgmma": ptx.count("wgmma.mma_async"), "serialised": "serializ" in text,
        })
        log.unlink()
print(json.dumps(rows))
"""


@pytest.mark.deviceless
def test_compiles_without_spills(tmp_path):
    """Each width with all that a mask can ask for, which is what takes the most registers; two without.

    In a process of its own, for what its compiler writes is asked for by the environment.
    """
    if reason := deviceless.why_not():
        pytest.skip(reason)
    wanted = [*((width, "private") for width in mosaic_gpu.WIDTHS), (72, None), (128, None)]
    command = [sys.executable, "-c", COMPILE, str(tmp_path), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 3 * len(wanted)
    assert not [row for row in rows if row["spills"] or row["serialised"] or not row["wgmma"]]
