"""`dito doctor`."""

import argparse

from dito_jax.planning.doctor import diagnosis


def main(_: argparse.Namespace) -> None:
    """Prints what this machine has and what runs on it."""
    print(diagnosis())
