"""The inspector says what the CUDA compiler says, of our functions only, and refuses in one line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import OPS, deviceless
from kernels_pallas.bench import inspect, machine_code
from kernels_pallas.hardware import H200
from kernels_pallas.op import PASSES, Case, Cost, Kernel, Op


def needs_compiler(test):
    absent = pytest.mark.skipif(deviceless.why_not() is not None, reason=str(deviceless.why_not()))
    return pytest.mark.deviceless(absent(test))


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kernels_pallas.inspect", *words], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["no_op"], ", ".join(op.name for op in OPS)),
        (["--device", "h900"], "h200, h100, a100, b200"),
        (["--kernel", "no_kernel"], "triton"),
        (["modulated_norm", "--case", "no_case"], "tiny_layer"),
    ],
)
def test_unknown_name_is_one_line_with_the_choices(words, wanted):
    run = command(*words)
    assert (run.returncode, run.stdout) == (2, "")
    [line] = run.stderr.splitlines()
    assert words[-1] in line and wanted in line


@pytest.mark.parametrize("device, present, absent", [("h200", "wgmma", "mma_sync"), ("a100", "mma_sync", "wgmma")])
@needs_compiler
def test_matrix_instructions_are_those_of_the_device(device, present, absent):
    run = command(
        "flash_attention", "--kernel", "triton", "--case", "tiny_unified_bf16_h72", "--device", device, "--json"
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {(row["pass"], row["function"]) for row in rows} == {
        ("forward", "flash_attention_forward"),
        ("backward", "flash_attention_backward_dq"),
        ("backward", "flash_attention_backward_dkv"),
    }
    for row in rows:
        assert set(row) == set(inspect.COLUMNS)
        assert row["device"] == device
        assert row[present] > 0 and row[absent] == 0 and row["cp_async"] > 0
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_memory_bytes"] <= H200.shared_memory


PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry {name}(.param .u64 out)
{{
  .reg .b32 %r<2>;
  .reg .b64 %rd<2>;
  .shared .align 16 .b8 tile[512];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, tile;
  cp.async.cg.shared.global [%r1], [%rd1], 16;
  cp.async.ca.shared.global [%r1], [%rd1], 8;
  cp.async.commit_group;
  cp.async.wait_group 0;
  ret;
}}
"""
LAUNCHES = """
001: kCustomKernel [source] loop_fusion grid: [8, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
  002: kCustomKernel [sink] toy_forward grid: [8, 1, 1] threads: [128, 1, 1]  shared_memory: 1024 bytes
"""


@needs_compiler
def test_a_dump_is_read_for_our_functions_alone(tmp_path):
    for name in ("loop_fusion", "toy_forward"):
        (tmp_path / f"{name}.ptx").write_text(PTX.format(name=name))
    (tmp_path / "module.thunk_sequence.txt").write_text(LAUNCHES)
    [row] = machine_code._functions("toy", tmp_path, "sm_90a")
    assert row["function"] == "toy_forward"
    assert row["shared_memory_bytes"] == 512 + 1024  # the tile, and what the launch asks for
    assert row["cp_async"] == 2  # neither the commit nor the wait is a copy
    assert row["wgmma"] == row["mma_sync"] == row["tcgen05"] == row["spill_bytes"] == 0
    with pytest.raises(subprocess.CalledProcessError):  # the assembler is told which GPU
        list(machine_code._functions("toy", tmp_path, "sm_80"))


def too_large(x, y):
    """A product whose tiles need more shared memory than an H200 has."""

    def body(x_ref, y_ref, out_ref):
        step = lambda k, acc: acc + pltriton.dot(x_ref[:, pl.ds(k * 64, 64)], y_ref[pl.ds(k * 64, 64), :])
        out_ref[...] = jax.lax.fori_loop(0, 16, step, jnp.zeros(out_ref.shape, jnp.float32))

    return pl.pallas_call(
        body,
        name="toy_forward",
        grid=(4, 4),
        in_specs=[
            pl.BlockSpec((256, 1024), lambda i, j: (i, 0)),
            pl.BlockSpec((1024, 256), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((256, 256), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=4),
    )(x, y)


@needs_compiler
def test_a_kernel_that_does_not_compile_has_one_line_that_says_why(tmp_path):
    def backward(residuals, d_out):
        raise ValueError("no gradient\nand more of the story")

    array = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    kernel = Kernel(lambda x, y: (too_large(x, y), (x, y)), backward, lambda x, y: None)
    toy = Op(
        "toy",
        jnp.matmul,
        {"triton": kernel},
        {p: lambda *_: Cost(1, 1) for p in PASSES},
        {"large": Case((array, array))},
    )
    mesh = deviceless.mesh("h200")
    forward, backward = inspect._rows(toy, "triton", "large", "h200", mesh, tmp_path / "dump")
    assert "Shared memory size limit exceeded" in forward["error"]
    assert backward["error"] == "ValueError: no gradient"
    assert len(inspect.table([forward, backward]).splitlines()) == 3


def test_table_flags_spills():
    row = dict.fromkeys(inspect.COLUMNS, 0)
    _, clean, spilled = inspect.table([row, row | {"spill_bytes": 8}]).splitlines()
    assert spilled.endswith("spills") and not clean.endswith("spills")
