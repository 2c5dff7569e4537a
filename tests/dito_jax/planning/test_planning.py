"""Planning: contents of a compiled step, and whole runs AOT-compiled for other GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dito_jax.models.dit import DiTConfig
from dito_jax.planning.block import FUSED, PLAIN, BlockRow, _passes, choices, measure, table, traffic
from dito_jax.planning.hlo import contents
from dito_jax.planning.lowering import without_payloads
from kernels_pallas import backend


pytestmark = pytest.mark.recorded("dito_jax", "configs", "kernels_pallas", "train.py")


ROOT = Path(__file__).parent.parent.parent.parent

HLO = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%p)
}

ENTRY %main (a: f32[8,4]) -> (f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %k.1 = bf16[8,4]{1,0} custom-call(%a), custom_call_target="t", backend_config={ir = "ML\\"EF", name = "my_forward"}
  %c = f32[8,4]{1,0} custom-call(%a), custom_call_target="__cublas$gemm"
  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  %g = f32[8]{0} fusion(%a), kind=kInput, calls=%fused
  %ags = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%a), dimensions={0}
  %agd = f32[64,4]{1,0} all-gather-done(%ags)
  %rs = bf16[2,4]{1,0} reduce-scatter(%a), dimensions={0}
  ROOT %t = (f32[8,4]{1,0}) tuple(%c)
}
"""


def test_the_contents_of_a_step_are_counted():
    found = contents(HLO)
    assert found.kernels == {"my_forward": 1}
    assert found.custom_calls == {"__cublas$gemm": 1}
    assert found.fusions == {"Loop": 1, "Input": 1}
    assert found.collectives == {"all-gather": (1, 64 * 4 * 4), "reduce-scatter": (1, 2 * 4 * 2)}
    assert found.instructions == 11


def test_payloads_are_left_out_of_the_text():
    text = without_payloads(HLO)
    assert 'ir = "..."' in text and "EF" not in text and contents(text) == contents(HLO)


def dito_hlo(tmp_path: Path, *arguments: str) -> tuple[str, str]:
    """The text and the page of a compiled step."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    subprocess.run(
        [sys.executable, "-m", "dito_jax", "hlo", *arguments, "--out", str(tmp_path)],
        cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    return (tmp_path / "train_step.optimized.txt").read_text(), (tmp_path / "report.md").read_text()


XL2 = ("configs/dit_xl2_imagenet256.py", "--gpus", "1xh200")


@pytest.fixture(scope="module")
def xl2(tmp_path_factory):
    """The step that is not private."""
    return dito_hlo(tmp_path_factory.mktemp("xl2"), *XL2)


def peak_mib(page: str) -> float:
    return float(page.split("| peak | ")[1].split(" ")[0].replace(",", ""))


@pytest.mark.slow("compiles a whole model's step for GPUs")
@pytest.mark.deviceless
def test_xl2_compiles_for_one_h200_with_our_kernels_and_fits(xl2):
    text, page = xl2
    kernels = contents(text).kernels
    for name in ("flash_attention_forward", "flash_attention_backward_dq", "flash_attention_backward_dkv",
                 "modulated_norm_forward", "modulated_norm_backward", "gated_residual_norm_forward",
                 "gated_residual_norm_backward", "qk_norm_rope_forward", "qk_norm_rope_backward"):  # fmt: skip
        assert kernels.get(name, 0) >= 1, (name, kernels)
        assert name in page
    assert 10_000 < peak_mib(page) < 139 * 1024, "MiB of one H200"


@pytest.mark.slow("compiles a whole model's step for GPUs")
@pytest.mark.deviceless
def test_a_private_step_of_xl2_takes_little_more_memory_by_our_kernels(xl2, tmp_path):
    # As many rows as the step without privacy has: without padding.
    private = (
        "--privacy.epsilon",
        "8",
        "--privacy.dataset",
        "imagenet",
        "--privacy.delta",
        "1e-7",
        "--privacy.max_batch",
        "256",
    )
    text, page = dito_hlo(tmp_path, *XL2, *private, "--train.gradient_accumulation_steps", "8")
    kernels = contents(text).kernels
    for name in ("ghost_norm_sq_forward_pairs", "ghost_norm_sq_forward_matrix", "clip_reduce_forward"):
        assert kernels.get(name, 0) >= 1, (name, kernels)
    assert 10_000 < peak_mib(page) < 1.25 * peak_mib(xl2[1])


@pytest.mark.slow("compiles a whole model's step for GPUs")
@pytest.mark.deviceless
def test_sharded_xl2_gathers_parameters_and_never_what_a_kernel_reads(tmp_path):
    """On fsdp=8 every all-gather is of a parameter; an activation would have the whole batch of 256 in its shape."""
    text, page = dito_hlo(
        tmp_path, "configs/dit_xl2_imagenet256.py", "--gpus", "8xh200", "--mesh.data", "1", "--mesh.fsdp", "8"
    )
    found = contents(text)
    assert found.kernels["flash_attention_forward"] >= 1
    assert found.collectives["all-gather"][0] >= 1
    gathers = [line for line in text.splitlines() if " all-gather" in line and "=" in line]
    assert not [line for line in gathers if "[256,256," in line.split(" all-gather")[0]]
    assert "all-gather" in page


@pytest.mark.slow("compiles a whole model's step for GPUs")
@pytest.mark.deviceless
@pytest.mark.parametrize("exchange", ["ragged", "all_to_all"])
def test_experts_on_eight_h200s_move_rows_and_never_each_others_matrices(exchange, tmp_path):
    text, page = dito_hlo(
        tmp_path, "configs/moe_dit_xl2_imagenet256.py", "--gpus", "8xh200",
        "--model.exchange", exchange, "--model.capacity_factor", "1.25",
    )  # fmt: skip
    found = contents(text)
    for name in ("dispatch_forward", "combine_forward", "expert_mlp_forward_up", "expert_mlp_forward_down",
                 "expert_mlp_backward_dz", "expert_mlp_backward_dw_up", "expert_mlp_backward_dw_down"):  # fmt: skip
        assert found.kernels.get(name, 0) >= 1, (name, found.kernels)
    kind = exchange.replace("_", "-") if exchange == "all_to_all" else "ragged-all-to-all"
    assert found.collectives[kind][0] >= 4, "there and back, forward and backward"
    assert kind in page
    # Eight experts of 1,152 x 2 x 4,608 and 4,608 x 1,152; of all of them together there is no array.
    assert not re.search(r"(?:bf16|f32)\[8,(?:1152,2,4608|1152,9216|4608,1152)\]", text)
    assert found.collectives.get("all-gather", (0, 0))[1] < 2**20
    assert 10_000 < peak_mib(page) < 139 * 1024, "MiB of one H200"


def test_the_step_is_printed_at_every_stage(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    for stage, words in [("jaxpr", "let"), ("stablehlo", "stablehlo.dot_general")]:
        subprocess.run(
            [sys.executable, "-m", "dito_jax", "hlo", "configs/digits.py", "--stage", stage, "--out", tmp_path],
            cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert words in (tmp_path / f"train_step.{stage}.txt").read_text()


BLOCK = """HloModule block

ENTRY %main (p0: bf16[4,8], p1: f32[8]) -> (bf16[4,8], f32[4]) {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %fusion.1 = bf16[4,8]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%fused
  %call = (bf16[4,8]{1,0}, f32[4]{0}) custom-call(%fusion.1), custom_call_target="__gpu$xla.gpu.triton"
  %get.0 = bf16[4,8]{1,0} get-tuple-element(%call), index=0
  %get.1 = f32[4]{0} get-tuple-element(%call), index=1
  %flat = bf16[32]{0} bitcast(%fusion.1)
  %zeros = f32[8]{0} constant({...})
  ROOT %tuple = (bf16[4,8]{1,0}, f32[4]{0}) tuple(%get.0, %get.1)
}
"""


def test_traffic_is_what_instructions_read_and_write():
    fusion, call = (64 + 32) + 64, 64 + (64 + 16)
    assert traffic(BLOCK) == (fusion + call, 2)


def test_each_fusion_is_compared_alone_and_all_together():
    differs = lambda kernels: {field for field in FUSED if getattr(kernels, field) != getattr(PLAIN, field)}
    alone = {field: {field} for field in FUSED}
    assert {name: differs(kernels) for name, kernels in choices().items()} == {"xla": set(), **alone, "all": {*FUSED}}


def test_a_block_computes_its_output_and_every_gradient():
    function, shapes = _passes(DiTConfig((4, 4, 1), 3, patch=2, depth=1, width=32, num_heads=2), 2)
    y, gradients = jax.eval_shape(function, *shapes)
    assert [leaf.shape for leaf in jax.tree.leaves((gradients, y))] == [leaf.shape for leaf in jax.tree.leaves(shapes)]


def test_the_page_of_a_block_compares_with_its_first_row():
    rows = [BlockRow("xla", 200_000_000, 9, 300.0), BlockRow("all", 50_000_000, 4, 100.0)]
    first, second = table(rows, "title").splitlines()[4:]
    assert (first, second) == ("| xla | 200 | 1.00 | 9 | 300 | 1.00 |", "| all | 50 | 0.25 | 4 | 100 | 3.00 |")


def test_a_block_is_timed_under_each_choice_of_kernels():
    """Where they run: here the interpreter."""
    config = DiTConfig((4, 4, 1), 3, patch=2, depth=1, width=32, num_heads=2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("device",))
    with backend.interpret_mode():
        rows = measure(config, 2, mesh)
    assert [row.name for row in rows] == ["xla", "norm", "qk_norm_rope", "mlp", "all"]
    assert all(row.microseconds is not None and row.microseconds > 0 for row in rows)
    first, last = table(rows, "title").splitlines()[4], table(rows, "title").splitlines()[-1]
    assert first.startswith("| xla | ") and first.endswith("| 1.00 |") and last.startswith("| all | ")


@pytest.mark.slow("compiles a whole model's step for GPUs")
@pytest.mark.deviceless
def test_fusions_move_less_memory_in_a_compiled_block():
    command = [sys.executable, "-m", "dito_jax", "block", "configs/digits.py", "--gpus", "1xh200"]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    share = {row[0].removeprefix("| "): float(row[2]) for row in rows}
    assert share["xla"] == 1 and max(share["norm"], share["qk_norm_rope"], share["mlp"]) < 1
    assert share["all"] < min(share["norm"], share["qk_norm_rope"], share["mlp"])
    assert all(row[4] == "not measured" for row in rows)


def test_a_block_needs_a_gpu_or_the_name_of_one():
    done = subprocess.run(
        [sys.executable, "-m", "dito_jax", "block", "configs/digits.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "kernels need an NVIDIA GPU" in done.stderr.splitlines()[-1]
