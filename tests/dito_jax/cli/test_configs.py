"""`dito configs`, `dito completion`, and the verbs that `dito --help` lists."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dito_jax.bundled import built_in_configs, config_path, summary
from dito_jax.cli import arguments, main as cli
from dito_jax.errors import UserError


CONFIGS = Path(__file__).parents[3] / "configs"


def test_every_verb_has_a_module_and_a_line_of_help(dito):
    folder = Path(cli.__file__).parent
    assert set(arguments.MODULES) == set(arguments.HELP)
    assert all((folder / f"{module}.py").is_file() for module in arguments.MODULES.values())
    code, out, _ = dito("--help")
    assert code == 0 and all(f"  {verb} " in out for verb in arguments.MODULES)


def test_every_built_in_config_is_listed_with_its_summary(dito):
    code, out, _ = dito("configs", "list")
    assert code == 0
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert listed == {path.stem: summary(path) for path in CONFIGS.glob("*.py")} and "digits" in listed


def test_a_config_is_shown_and_copied_but_nothing_is_overwritten(dito, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "digits.py").read_text()
    assert dito("configs", "show", "digits")[1] == text
    assert dito("configs", "copy", "digits")[1] == "digits.py\n"
    assert (tmp_path / "digits.py").read_text() == text
    code, _, err = dito("configs", "copy", "digits")
    assert code == 2 and err == "dito: digits.py exists already; give another path.\n"
    assert dito("configs", "copy", "strokes", "mine.py")[0] == 0 and (tmp_path / "mine.py").is_file()


def test_a_config_is_a_file_or_a_built_in_name_and_the_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("digits") == built_in_configs()["digits"]
    (tmp_path / "digits").write_text("")
    assert config_path("digits") == Path("digits")
    with pytest.raises(UserError, match=r"no config file 'strokez', and no built-in config .* Did you mean strokes\?"):
        config_path("strokez")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_options_and_fields(dito, tmp_path):
    code, script, _ = dito("completion", "bash")
    assert code == 0
    (tmp_path / "dito.bash").write_text(script)
    ask = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p dito | sed 's/.*-F \\([^ ]*\\).*/\\1/') dito
echo "${COMPREPLY[@]}"
"""

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", ask, "ask", str(tmp_path / "dito.bash"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    assert completed("dito", "sup") == ["supervise"]
    assert completed("dito", "sample", "--gui") == ["--guidance"]
    assert completed("dito", "train", "digits", "--optimizer.le") == ["--optimizer.learning_rate"]
