"""`dito eval RUN`: the evaluation of the latest checkpoint."""

import argparse

from dito_jax.evaluation.expert_load import make_load_meter
from dito_jax.evaluation.final_evaluation import final_evaluation
from dito_jax.evaluation.sample import make_batch_sampler
from dito_jax.run import saved_run


def main(options: argparse.Namespace) -> None:
    """Re-runs the evaluation."""
    run, config = saved_run.opened(options.run)
    program, state, step = saved_run.restored_here(run, config)
    draw = make_batch_sampler(program.graph, config.model, config.sample, config.loss.prediction)
    figures = final_evaluation(
        run, draw, saved_run.sampled_ema(state, config),
        config.data.open("train"), config.data.open("validation") if config.evaluation.num_samples else None,
        sample=config.sample, evaluation=config.evaluation, seed=config.train.seed,
        load=make_load_meter(program.graph, config.model, seed=config.train.seed),
        private=config.privacy.epsilon is not None,
    )  # fmt: skip
    for name, value in (figures or {}).items():
        print(f"{name}: {value}")
    print(f"step {step}: {run.report if figures else run.samples / 'final.png'}")
