"""The files that docs/extending.md prints, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas.ffi import libraries


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(kernels_pallas/[\w/.]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
LINE = re.search(r'`("ffi": Kernel\(.*?\))`', PAGE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the op and its Triton kernel, and the tests of all ops."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "kernels_pallas", root / "kernels_pallas", ignore=shutil.ignore_patterns("__pycache__"))
    tests = root / "tests" / "kernels_pallas"
    tests.mkdir(parents=True)
    plugins = ("conftest.py", "recorded.py", "dependencies.py", "report.py")
    for file in (*plugins, "kernels_pallas/test_ops.py", "../pyproject.toml"):
        shutil.copy(ROOT / "tests" / file, root / "tests" / file)
    for path, text in FILES.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    names = "\n\nfrom .energy import TOKEN_ENERGY as TOKEN_ENERGY, token_energy as token_energy  # noqa: E402\n\n\n"
    with (root / "kernels_pallas" / "__init__.py").open("a") as package:
        package.write(names + "OPS = (*OPS, TOKEN_ENERGY)\n")
    return root


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy), "KERNELS_PALLAS_CACHE": str(copy / "cache")}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)


def test_the_page_says_what_is_in_each_file():
    assert [path.split("/")[-1] for path in FILES] == [
        "reference.py", "cases.py", "cost.py", "triton.py", "api.py", "__init__.py", "token_energy.cc", "ffi.py",
    ]  # fmt: skip
    assert LINE is not None


def passes_the_tests_of_all_ops(copy):
    done = run(copy, "-m", "pytest", "-q", "tests/kernels_pallas/test_ops.py", "-k", "token_energy")
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 30


def test_the_op_passes_the_tests_of_all_ops(copy):
    passes_the_tests_of_all_ops(copy)


@pytest.mark.skipif(libraries.compiler("cpu") is None, reason="needs a C++ compiler")
def test_the_custom_call_gives_the_definitions_answer(copy):
    calls, api = copy / "kernels_pallas" / "ffi" / "custom_calls.py", copy / "kernels_pallas" / "energy" / "api.py"
    text = calls.read_text()
    assert '"cpu": (' in text and LINE is not None
    calls.write_text(text.replace('"cpu": (', '"cpu": ("token_energy", ', 1))
    text = api.read_text()
    api.write_text(
        text.replace("import cost,", "import cost, ffi,").replace("unsupported)}", f"unsupported), {LINE[1]}}}")
    )
    built = run(copy, "-m", "kernels_pallas.build", "cpu")
    assert built.returncode == 0, built.stderr
    program = """
import jax, jax.numpy as jnp
from kernels_pallas import TOKEN_ENERGY, token_energy
x = jax.random.normal(jax.random.key(0), (3, 37, 72))
assert TOKEN_ENERGY.runnable(x) == ["ffi", "xla"], TOKEN_ENERGY.runnable(x)
of = lambda name: lambda x: token_energy(x, implementation=name)
alike = lambda f: jnp.allclose(f(of("ffi")), f(of("xla")), rtol=1e-6)
assert alike(lambda f: f(x)) and alike(lambda f: jax.vmap(f)(x[None]))
assert alike(lambda f: jax.grad(lambda x: f(x).sum())(x))
print(TOKEN_ENERGY.kernels["ffi"].unsupported(x.astype(jnp.bfloat16)))
"""
    done = run(copy, "-c", program)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "takes float32, got bfloat16"
    passes_the_tests_of_all_ops(copy)
