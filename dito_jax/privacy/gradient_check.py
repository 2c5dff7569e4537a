"""The check at the start of a private run: an example's gradient by hooks against that by automatic differentiation.

Clipping by hooks bounds a gradient only if every use of every parameter has its hook. `ghost_clipping.check_uses`
counts the uses; this check compares numbers, on the run's own network, mesh and compute dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.privacy.clipping import ClippedSum
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.privacy.step import draw_losses
from dito_jax.sharding import batch_pieces, shardings
from dito_jax.training.program import LoopConfig
from dito_jax.training.state import split_model
from dito_jax.training.step import cast
from dito_jax.training.trainable import divided


# The largest difference, relative to the gradient: rounding of two programs. A use without a hook is of the order of 1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
DRAWS = 2


def check_gradients(
    model: DiTConfig, loss: LossConfig, loop: LoopConfig, mesh: jax.sharding.Mesh, privacy: PrivacyConfig
) -> None:
    """Compares the gradient of one random example by the run's backend with that of jax.grad; under `jax.set_mesh`.

    The parameters are initial ones plus noise, because zero-initialized layers would hide others. No data are used. The
    backends without hooks, "vmap" and "microbatch", need no check.

    Raises:
      UserError: the gradients differ by more than TOLERANCE.
    """
    if privacy.backend not in ("ghost", "bookkeeping"):
        return
    graph, params = split_model(model)
    losses = functools.partial(draw_losses, config=loss)
    narrowed = functools.partial(cast, dtype=loop.compute_dtype)
    clipped_sum = ClippedSum(graph, losses, 1e30, privacy.backend, cast=narrowed)  # nothing is clipped

    def compare(params, examples):
        trained, frozen = divided(params, loop.trainable)
        padding = jnp.arange(len(examples["t"])) > 0  # all but the first
        hooked, measured = clipped_sum(trained, examples, padding, frozen)

        def loss_of_first(trained):
            network = nnx.merge(graph, narrowed(nnx.merge_state(trained, frozen)))
            return clipped_sum.example_losses(network, examples)[0]

        wanted = jax.grad(loss_of_first)(trained)
        difference = jax.tree.map(lambda a, b: a - b.astype(jnp.float32), hooked, wanted)
        return optax.tree.norm(wanted), measured.norm[0], optax.tree.norm(difference)

    init = jax.jit(lambda: _moved(model), out_shardings=shardings(params, mesh))
    examples = _examples(model, batch_pieces(mesh.shape))
    right, norm, difference = map(float, jax.jit(compare)(init(), examples))
    if not (0 < right < math.inf and max(difference, abs(norm - right)) <= TOLERANCE[loop.compute_dtype] * right):
        raise UserError(
            f"privacy.backend {privacy.backend!r}: the gradient of an example has the norm {norm:.4g} by hooks and "
            f"{right:.4g} by jax.grad, and they differ by {difference:.4g}: clipping would not bound it. Set "
            "privacy.backend to 'microbatch'."
        )


def _moved(model: DiTConfig) -> nnx.State:
    leaves, tree = jax.tree.flatten(nnx.state(model.build(nnx.Rngs(0)), nnx.Param))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def _examples(model: DiTConfig, count: int) -> dict[str, jax.Array]:
    image, noise, time, label = jax.random.split(jax.random.key(2), 4)
    rows = count, DRAWS
    return {
        "image": jax.random.normal(image, (*rows, *model.image_shape)),
        "noise": jax.random.normal(noise, (*rows, *model.image_shape)),
        "t": jax.random.uniform(time, rows, minval=0.1, maxval=0.9),
        "label": jax.random.randint(label, rows, 0, model.num_classes),
        "weight": jnp.full(rows, 1 / DRAWS),
    }
