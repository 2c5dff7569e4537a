"""`dito export`: usage errors are found before anything is read or written."""

import dataclasses
import sys

import pytest

from dito_jax.cli import main as cli
from dito_jax.config import to_json
from dito_jax.run import saved_run
from dito_jax.telemetry.run_directory import RunDirectory


pytestmark = pytest.mark.optimized("an artifact's results are compared, to the bit, with those of another process")


@pytest.fixture
def said(config, tmp_path, monkeypatch, capsys):
    """`said(*arguments)`: what `dito export RUN *arguments` says on stderr as it is refused; RUN has no checkpoint."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()

    def refused(*arguments: str, epsilon: float | None = None) -> str:
        private = dataclasses.replace(config.privacy, epsilon=epsilon)
        run.config.write_text(to_json(dataclasses.replace(config, privacy=private)))
        monkeypatch.setattr(saved_run, "restored_here", lambda *_: pytest.fail("it goes on"))
        monkeypatch.setattr(sys, "argv", ["dito", "export", str(run.path), *arguments])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refused


def test_the_step_of_a_private_run_is_not_exported_without_its_ledger(said):
    assert "is a private run, whose steps only train.py takes" in said("--what", "train_step", epsilon=8.0)


def test_what_cannot_be_checked_here_is_not_written(said):
    assert said("--platform", "cuda") == "dito: export: --platform cuda on a machine that has cpu; add it: cpu,cuda.\n"


def test_a_platform_that_there_is_not_and_a_file_for_a_directory(said, tmp_path):
    assert "'cpu,tpu' is not of cpu,cuda" in said("--platform", "cpu,tpu")
    (tmp_path / "taken").touch()
    assert f"-o {tmp_path / 'taken'} is a file; give a directory." in said("-o", str(tmp_path / "taken"))
