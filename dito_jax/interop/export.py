"""Export of a run's denoiser, sampler or train step as a function of plain arrays (jax.export, StableHLO)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jax.core import Tracer

from dito_jax.diffusion.path import Quantity
from dito_jax.evaluation.sample import SampleConfig, make_draw
from dito_jax.interop.artifact import Arrays
from dito_jax.models.dit import DiTConfig
from dito_jax.training.program import Program
from dito_jax.training.state import TrainState


What = Literal["denoiser", "sampler", "train_step"]
# Arguments of artifact.write: a function of (weights, *inputs), weights, inputs, and for each platform the function
# with the fixed shapes of these inputs.
Made = tuple[export.Exported, Arrays, list[np.ndarray], list[export.Exported]]
BATCH = 2  # batch size of the check inputs if the exported batch size is symbolic


def exported_denoiser(graph: nnx.GraphDef, params: nnx.State, model: DiTConfig, platforms: Sequence[str]) -> Made:
    """Exports (weights, z (b, h, w, c), t (b,), label (b,)) -> prediction (b, h, w, channels), for any b."""
    unflatten, weights = _by_name(params)
    run = lambda weights, z, t, label: nnx.merge(graph, unflatten(weights))(z, t, label)
    rng = np.random.default_rng(0)
    inputs = [
        rng.standard_normal((BATCH, *model.image_shape)).astype(np.float32),
        np.linspace(0.2, 0.8, BATCH, dtype=np.float32),
        np.arange(BATCH, dtype=np.int32) % model.num_classes,
    ]
    return _exported(run, weights, inputs, platforms, symbolic=[True] * 3)


def exported_sampler(
    graph: nnx.GraphDef,
    params: nnx.State,
    model: DiTConfig,
    sample: SampleConfig,
    prediction: Quantity,
    platforms: Sequence[str],
) -> Made:
    """Exports (weights, label (b,), threefry key uint32[2], index (b,)) -> images (b, h, w, c), for any b."""
    unflatten, weights = _by_name(params)
    draw = make_draw(graph, model, sample, prediction)
    run = lambda weights, label, key, index: draw(unflatten(weights), label, jax.random.wrap_key_data(key), index)
    labels = np.arange(BATCH, dtype=np.int32)
    inputs = [labels % model.num_classes, np.array([0, 0], np.uint32), labels]
    return _exported(run, weights, inputs, platforms, symbolic=[True, False, True])


def exported_train_step(program: Program, state: TrainState, platforms: Sequence[str]) -> Made:
    """Exports (state by name, *batch in the order of its names) -> (state by name, metrics), for the run's batch."""
    unflatten, weights = _by_name(state)
    names = sorted(program.batch)

    def run(weights, *batch):
        after, metrics = program.step(unflatten(weights), dict(zip(names, batch, strict=True)))
        return _by_name(after)[1], metrics

    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.random(leaf.shape).astype(leaf.dtype)
    inputs = [draw(program.batch[name]) for name in names]
    return _exported(run, weights, inputs, platforms, symbolic=[False] * len(inputs))


def _exported(
    run: Callable[..., Any], weights: Arrays, inputs: list[np.ndarray], platforms: Sequence[str], symbolic: list[bool]
) -> Made:
    (batch,) = export.symbolic_shape("batch")
    shape = lambda x, free: (batch, *x.shape[1:]) if free else x.shape
    specs = [jax.ShapeDtypeStruct(shape(x, free), x.dtype) for x, free in zip(inputs, symbolic, strict=True)]
    of_weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    exported = export.export(jax.jit(run), platforms=tuple(platforms))(of_weights, *specs)
    whole = jax.jit(run, keep_unused=True)  # so that it has the same arguments on every platform
    static = [export.export(whole, platforms=(platform,))(of_weights, *inputs) for platform in platforms]
    return exported, weights, inputs, static


def _by_name(tree: Any) -> tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]:
    """(unflatten, arrays by path): a tree as a flat dict {"blocks/attention/qkv/kernel": array}, and the inverse."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    unflatten = lambda arrays: jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])
    to_host = lambda leaf: leaf if isinstance(leaf, Tracer) else np.asarray(leaf)
    return unflatten, {name: to_host(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
