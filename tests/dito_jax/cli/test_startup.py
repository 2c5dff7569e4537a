"""What answers at once: help, the version and mistakes import nothing that is slow."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
SLOW = ("sklearn", "scipy", "grain", "matplotlib", "orbax", "jax_privacy", "dp_accounting", "tensorboardX")
FRAMEWORK = ("jax", "flax", "optax", "numpy", "tyro", "kernels_pallas")
SCRIPT = """
import sys
from dito_jax.cli.main import main
sys.argv = ["dito", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("code", end.code or 0)
print("imported", *(name for name in sys.modules if "." not in name))
"""


def imported(script: str, *arguments: str) -> tuple[str, set[str]]:
    """What a fresh process prints, and the packages that it has imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    said, _, names = done.stdout.rpartition("imported ")
    return said + done.stderr, set(names.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "Multi-process launcher"),
        (["--version"], "dito_jax "),
        (["sample", "--help"], "--guidance"),
        (["sampel", "x"], "did you mean sample?"),
        (["sample", "runs/x", "--seed", "3", "--nun", "4"], "no option --nun; did you mean --num?"),
        (["privacy", "audit", "runs/x", "--bogus"], "no option --bogus"),
        (["configs", "list"], "digits"),
        (["configs", "show", "digit"], "did you mean digits?"),
    ],
)
def test_help_and_mistakes_import_neither_jax_nor_anything_slow(arguments, words):
    said, names = imported(SCRIPT, *arguments)
    assert words in said and "Traceback" not in said
    assert "dito_jax" in names and not names & {*SLOW, *FRAMEWORK}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digits", "--train.stepz", "5"], "did you mean --train.steps"),
        (["train", "digit"], "Did you mean digits?"),
        (["hlo", "digits", "--gpus"], "expected one argument"),
    ],
)
def test_a_mistake_in_a_config_imports_only_what_configs_are_made_of(arguments, words):
    said, names = imported(SCRIPT, *arguments)
    assert words in said and "code 2" in said
    assert "dito_jax" in names and not names & set(SLOW)


def test_the_package_is_imported_without_jax():
    _, names = imported("import dito_jax, sys; print('imported', *(n for n in sys.modules if '.' not in n))")
    assert "dito_jax" in names and not names & {*SLOW, *FRAMEWORK}
