"""What the tests of the command line share: the `dito` command in this process."""

import sys

import pytest

from dito_jax.cli import main as cli


@pytest.fixture
def dito(monkeypatch, capsys):
    """`dito(*arguments)`: (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dito", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
