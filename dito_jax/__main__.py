"""`python -m dito_jax` is the `dito` command."""

from dito_jax.cli.main import main


main()
