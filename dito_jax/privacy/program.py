"""The jitted init and private train step of a run, with shapes and shardings (see training/program.py)."""

import jax
import jax.numpy as jnp

from dito_jax.diffusion.loss import LossConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.privacy.step import make_private_step
from dito_jax.sharding import batch_pieces, spec
from dito_jax.training.health import GuardConfig
from dito_jax.training.optimizer import OptimizerConfig, make_optimizer
from dito_jax.training.program import LoopConfig, Program, assemble
from dito_jax.training.state import split_model


def make_private_program(
    model: DiTConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    mesh: jax.sharding.Mesh,
    guard: GuardConfig,
    privacy: PrivacyConfig,
    plan: StepPlan,
) -> Program:
    """The Program of a private run on this mesh; call it under `jax.set_mesh(mesh)`."""
    update = make_optimizer(optimizer, loop.steps)
    graph, _ = split_model(model)
    step = make_private_step(
        graph,
        update,
        loss,
        null_label=model.num_classes,
        decays=loop.ema_decays,
        compute_dtype=loop.compute_dtype,
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        clip_norm=privacy.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        expected_batch=plan.expected_batch,
        noise_multiplicity=privacy.noise_multiplicity,
        backend=privacy.backend,
        microbatch=privacy.microbatch,
        internal=privacy.internal,
        trainable=loop.trainable,
    )
    by_unit = jax.NamedSharding(mesh, spec("B", mesh))
    everywhere = jax.NamedSharding(mesh, jax.P())
    rows = (plan.rows(batch_pieces(mesh.shape) * loop.gradient_accumulation_steps), privacy.images_per_user or 1)
    batch = {
        "image": jax.ShapeDtypeStruct((*rows, *model.image_shape), jnp.float32, sharding=by_unit),
        "label": jax.ShapeDtypeStruct(rows, jnp.int32, sharding=by_unit),
        "padding": jax.ShapeDtypeStruct(rows, jnp.bool_, sharding=by_unit),
        "draw_key": jax.ShapeDtypeStruct((8,), jnp.uint32, sharding=everywhere),
        "noise_key": jax.ShapeDtypeStruct((8,), jnp.uint32, sharding=everywhere),
    }
    return assemble(model, update, loop, mesh, guard, step, batch)
