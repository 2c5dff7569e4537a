"""Step cost: a row per recipe, ratios to the first row, and reasons for missing values."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dito_jax.errors import UserError
from dito_jax.planning import step_cost
from dito_jax.planning.step_cost import Cost, costs, table
from kernels_pallas.hardware import H200


ROOT = Path(__file__).parents[3]
# One wide block of four tokens, and few trained parameters: each has a draw of noise to compile.
SMALL = (
    "--model.depth", "1", "--model.patch", "4", "--train.batch_size", "32", "--train.trainable", "mlp",
)  # fmt: skip
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.mark.slow("compiles and runs five train steps")
def test_private_steps_are_compared_with_the_one_that_is_not():
    done = subprocess.run(
        [sys.executable, "-m", "dito_jax", "privacy", "cost", "configs/digits.py", *SMALL],
        cwd=ROOT, env=os.environ | QUICK, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["not private", "bookkeeping", "ghost", "microbatch", "vmap"]
    assert rows[0][2] == rows[0][4] == "1.00"
    assert all(float(figure) > 0 for row in rows for figure in row[1:])
    memory = {row[0]: float(row[1]) for row in rows}
    # 32 gradients of the MLP, beside what its four tokens leave behind; one gradient at a time.
    assert memory["vmap"] > 2 * memory["bookkeeping"] > 2 * memory["not private"]
    assert memory["microbatch"] < memory["bookkeeping"]


def failing(error):
    def recipe():
        raise error

    return recipe


def test_what_is_refused_or_has_no_memory_says_so_in_its_row(monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    short = step_cost.Prepared(None, lambda: None, None, 3 * 2**30)
    monkeypatch.setattr(step_cost, "prepare", lambda program, mesh: short)
    monkeypatch.setattr(step_cost, "milliseconds", lambda _: failing(jax.errors.JaxRuntimeError("RESOURCE: so much"))())
    recipes = {
        "refused": failing(UserError("privacy.noise_multiplicity 0 is not positive.")),
        "absent": failing(NotImplementedError("triton: needs a GPU\nand a page more")),
        "large": failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 400 GiB\nAllocations: ...")),
        "when run": lambda: None,
    }
    assert [*table(costs(recipes, mesh))][1:] == [
        "| refused | - | - | - | - | privacy.noise_multiplicity 0 is not positive. |",
        "| absent | - | - | - | - | triton: needs a GPU |",
        "| large | - | - | - | - | RESOURCE_EXHAUSTED: 400 GiB |",
        "| when run | 3 | - | - | - | RESOURCE: so much |",
    ]


def test_a_bug_is_no_row():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(TypeError, match="ours"):
        list(costs({"broken": failing(TypeError("ours"))}, mesh))


def test_each_row_is_told_before_the_next_is_made():
    made = []

    def rows():
        for name in ("first", "second", "third"):
            made.append(name)
            yield Cost(name, 2**30, 10.0 * len(made))

    lines = table(rows())
    next(lines)
    assert next(lines) == "| first | 1 | 1.00 | 10 | 1.00 |  |" and made == ["first"]
    assert next(lines) == "| second | 1 | 1.00 | 20 | 2.00 |  |"
    assert next(lines) == "| third | 1 | 1.00 | 30 | 3.00 |  |"


@pytest.mark.parametrize(("peak", "said"), [(H200.memory, ""), (H200.memory + 1, "does not fit: the GPU has 141 GiB")])
def test_a_step_that_is_larger_than_its_gpu_is_told(peak, said):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=H200.device_kind)]))
    assert step_cost._short(peak, mesh) == said
