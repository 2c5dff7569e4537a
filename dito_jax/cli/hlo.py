"""`dito hlo CONFIG --gpus 8xh200`."""

import argparse
from pathlib import Path

import jax

from dito_jax.config import check, load, resolved
from dito_jax.overrides import override
from dito_jax.planning.hlo import page
from dito_jax.planning.lowering import lower_step, planned_mesh
from dito_jax.run.recipe import planned_program


def main(options: argparse.Namespace) -> None:
    """Writes the compiled train step as text, and report.md about it."""
    config = resolved(override(load(options.config), options.overrides))
    mesh = planned_mesh(config.mesh, options.gpus)
    check(config, mesh.size)
    where = options.gpus or f"{mesh.size}x{mesh.devices.flat[0].device_kind}"
    out = Path(options.out or f"runs/hlo/{Path(options.config).stem}_{where}")
    with jax.set_mesh(mesh):
        program = planned_program(config, mesh)
        lowered = lower_step(program, options.stage)
    text = out / f"train_step.{options.stage}.txt"
    out.mkdir(parents=True, exist_ok=True)
    text.write_text(lowered.text)
    print(text)
    if options.stage == "optimized":
        (out / "report.md").write_text(page(f"{Path(options.config).stem} on {where}", lowered))
        print((out / "report.md").read_text())
        print(out / "report.md")
