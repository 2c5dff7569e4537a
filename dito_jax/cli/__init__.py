"""The `dito` command: one verb a file."""
