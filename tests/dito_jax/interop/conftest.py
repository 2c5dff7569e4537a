"""Shared fixtures: a tiny network and its artifacts for CPU and CUDA."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.config import TrainConfig, load
from dito_jax.interop import artifact
from dito_jax.interop.export import exported_denoiser, exported_sampler, exported_train_step
from dito_jax.models.kernels import KernelsConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.program import make_program


PLATFORMS = ("cpu", "cuda")
PLAIN = KernelsConfig(attention="xla", norm="xla", qk_norm_rope="xla")  # on a GPU too, for exports to both platforms


@pytest.fixture(scope="session")
def config() -> TrainConfig:
    whole = load("configs/digits.py")
    return dataclasses.replace(
        whole,
        model=dataclasses.replace(whole.model, depth=2, width=32, kernels=PLAIN),
        sample=dataclasses.replace(whole.sample, steps=3),
        train=dataclasses.replace(whole.train, batch_size=4),
    )


@pytest.fixture(scope="session")
def trained(config):
    """(program, state) on one device, with a last layer that says something."""
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        program = make_program(config.model, config.loss, config.optimizer, config.train, mesh)
        state = program.init()
    shaken = jax.tree.map(lambda p: p + 0.05 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), state.params)
    return program, dataclasses.replace(state, params=shaken)


@pytest.fixture(scope="session")
def artifact_of(config, trained, tmp_path_factory) -> Callable[[str], Path]:
    """`artifact_of(what)`: the directory of a "denoiser", "sampler" or "train_step", written once."""
    program, state = trained

    @functools.cache
    def written(what: str) -> Path:
        if what == "denoiser":
            made = exported_denoiser(program.graph, state.params, config.model, PLATFORMS)
        elif what == "sampler":
            sample, prediction = config.sample, config.loss.prediction
            made = exported_sampler(program.graph, state.params, config.model, sample, prediction, PLATFORMS)
        else:
            made = exported_train_step(program, state, PLATFORMS)
        directory = tmp_path_factory.mktemp("artifact") / what
        artifact.write(directory, *made, {"what": what})
        return directory

    return written


@pytest.fixture(scope="session")
def listed() -> Callable[[Path, str], list[np.ndarray]]:
    """`listed(directory, "input")`: the arrays of host/arguments.txt, read as a host does: bytes at an offset."""

    def read(directory: Path, wanted: str) -> list[np.ndarray]:
        found = []
        for line in (directory / "host/arguments.txt").read_text().splitlines():
            kind, file, offset, size, dtype, *dims = line.split(" ")
            if kind == wanted:
                whole = (directory / file).read_bytes()[int(offset) : int(offset) + int(size)]
                found.append(np.frombuffer(whole, jnp.dtype(dtype)).reshape([int(dim) for dim in dims]))
        return found

    return read
