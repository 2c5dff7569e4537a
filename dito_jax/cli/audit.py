"""`dito privacy audit RUN`: an empirical privacy audit, in audit.json, audit.md and two pictures.

The claim that is tested is the epsilon of the ledger, or --epsilon; with --epsilon a run that is not private can be
audited too.
"""

import argparse

import numpy as np
from flax import nnx

from dito_jax.config import TrainConfig
from dito_jax.data import Source, drawn
from dito_jax.errors import UserError
from dito_jax.evaluation.metrics import closest_pairs
from dito_jax.evaluation.pixels import visible
from dito_jax.evaluation.plots import image_grid, roc_curves
from dito_jax.evaluation.sample import balanced_labels, make_sampler
from dito_jax.privacy.audit import attacked, findings, make_scorers, report
from dito_jax.privacy.canaries import planted
from dito_jax.privacy.mechanism_audit import check_mechanism
from dito_jax.run import saved_run
from dito_jax.run.privacy_card import card_of
from dito_jax.telemetry.run_directory import RunDirectory


SAMPLES, SHOWN = 500, 32


def audit(options: argparse.Namespace) -> str:
    """Runs the audit. A refuted claim is an error, raised after all files are written."""
    run, config = saved_run.opened(options.subject)
    claimed, mechanism = _claim(run, config, options.epsilon)
    program, state, step = saved_run.restored_here(run, config)
    params = saved_run.sampled_ema(state, config)
    train, most = config.data.open("train"), config.evaluation.max_reference
    members, validation = drawn(train, most), drawn(config.data.open("validation"), most)
    build = lambda params: nnx.merge(program.graph, params)
    scorers = make_scorers(build, config.loss, seed=config.train.seed, together=config.model.together)
    scores = attacked(scorers, params, members, validation)
    draw = make_sampler(program.graph, config.model, config.sample, config.loss.prediction)
    labels = balanced_labels(config.evaluation.num_samples or SAMPLES, train.num_classes)
    samples = draw(params, labels, config.train.seed)
    found = findings(
        scores, members, validation, samples, canaries=_canaries(run, config, train, scorers["loss"], params),
        mechanism=mechanism, claimed_epsilon=claimed, delta=config.privacy.delta,
    )  # fmt: skip
    roc_curves(scores, run.path / "audit" / "roc.png")
    pairs = closest_pairs(samples, members["image"], SHOWN)
    beside = np.stack([image for i, j in pairs for image in (samples[i], members["image"][j])])
    image_grid(visible(beside), run.path / "audit" / "nearest.png", columns=8)
    run.write_json("audit.json", {"step": step} | found)
    said = report(f"{run.path.name}, step {step}", found)
    run.write_text("audit.md", said)
    if found["verdict"] != "not refuted":
        raise UserError(f"{run.path}: the claim of epsilon {claimed:.4g} is {found['verdict']}; see audit.md there.")
    return said.rstrip()


def _claim(run: RunDirectory, config: TrainConfig, wanted: float | None):
    """The claimed epsilon, and the audit of the clipping and noise of a private run."""
    if config.privacy.epsilon is None:
        if wanted is None:
            raise UserError(f"{run.path}: not a private run: say which epsilon to hold it to, with --epsilon.")
        return wanted, {}
    facts = card_of(run, config)
    dtype, seed = config.train.compute_dtype, config.train.seed
    mechanism = check_mechanism(config.privacy, facts["noise_multiplier"], compute_dtype=dtype, seed=seed)
    return facts["epsilon"] if wanted is None else wanted, mechanism


def _canaries(run: RunDirectory, config: TrainConfig, train: Source, scorer, params):
    """The canaries of the run, each with its negative loss."""
    if not config.canaries:
        return None
    canaries = planted(train, config.canaries, run).canaries
    return canaries, scorer(params, canaries.image, canaries.label)
