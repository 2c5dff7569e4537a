"""The DP statement of a saved run."""

from typing import Any

from dito_jax.config import TrainConfig
from dito_jax.privacy.card import card
from dito_jax.telemetry.run_directory import RunDirectory


def card_of(run: RunDirectory, config: TrainConfig) -> dict[str, Any]:
    """What a private run guarantees, and on what grounds: the content of privacy_card.json."""
    return card(
        run, config.privacy, init_from=config.init_from, trainable=config.train.trainable, canaries=config.canaries
    )
