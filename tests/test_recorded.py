"""Tests that are left out: recorded after they pass, left out while their code is unchanged, and never otherwise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import dependencies, recorded


ROOT = Path(__file__).parents[1]
FILES = {
    "tests/conftest.py": """
        from tests import recorded
        pytest_addoption = recorded.add_options
        def pytest_configure(config):
            config.pluginmanager.register(recorded.Recorded(config))
        """,
    "tests/test_part.py": """
        import pytest
        from configs import part
        pytestmark = pytest.mark.recorded
        @pytest.mark.parametrize("x", [1, 2])
        def test_sum(x):
            assert part.plus_one(x) == x + 1
        def test_absent():
            pytest.importorskip("no_such_module")
        """,
    "tests/test_other.py": """
        import pytest
        @pytest.mark.recorded("configs/other.py")
        def test_hidden_import():
            assert __import__("configs.hidden", fromlist=["two"]).two() == 2
        def test_never_left_out():
            pass
        """,
    "configs/part.py": "from configs.below import ONE\ndef plus_one(x):\n    return x + ONE\n",
    "configs/below.py": "ONE = 1\n",
    "configs/other.py": "",
    "configs/hidden.py": "def two():\n    return 2\n",
    "kernels_pallas/__init__.py": "",
    "kernels_pallas/ffi/libraries.py": "def compiler(library):\n    return None\n",
    "kernels_pallas/measured.py": "def content(path):\n    return path.read_bytes()\n",
    "pyproject.toml": """
        [project]
        dependencies = ["pytest>=1"]
        [project.optional-dependencies]
        dev = []
        [tool.pytest.ini_options]
        addopts = "--import-mode=importlib --strict-markers -p no:cacheprovider"
        pythonpath = ["."]
        markers = ["recorded"]
        """,
}


def plain(text: str) -> str:
    return text.replace("\n        ", "\n").lstrip("\n")


@pytest.fixture
def project(tmp_path):
    """A small repository with the plug-in, and the passed, skipped and failed tests of a run of its tests."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(plain(text))
    for name in ("recorded.py", "dependencies.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)

    def run(*words: str, file: str = "tests/test_part.py", code: int = 0) -> list[int]:
        command = [sys.executable, "-m", "pytest", "-rA", file, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        run.output = done.stdout
        return [done.stdout.count(f"\n{word} ") for word in ("PASSED", "SKIPPED", "FAILED")]

    return tmp_path, run


def groups(folder: Path) -> set[str]:
    return set(json.loads((folder / "tests" / "recorded.json").read_text()))


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_what_passed_is_left_out_until_its_code_changes(project, workers):
    folder, run = project
    assert run("--record", *workers) == [2, 1, 0]
    assert groups(folder) == {"tests/test_part.py"}
    assert run("--skip-recorded", *workers, code=0) == [0, 1, 0]  # what was skipped may run elsewhere
    assert "2 tests left out" in run.output
    assert run(*workers) == [2, 1, 0]  # without the option everything runs
    (folder / "configs/below.py").write_text("ONE = 2\n")  # imported by what the test imports
    assert run("--skip-recorded", *workers, code=1) == [0, 1, 2]


def test_a_group_is_recorded_only_if_each_of_its_tests_ran_and_passed(project):
    folder, run = project
    run("--record", "-k", "1 or absent")
    assert groups(folder) == set()
    (folder / "configs/below.py").write_text("ONE = 2\n")
    run("--record", code=1)
    assert groups(folder) == set()
    (folder / "configs/below.py").write_text("ONE = 1\n")
    run("--record")
    (folder / "configs/below.py").write_text("ONE = 2\n")
    run("--record", code=1)  # the old record stays, of the old code
    assert run("--skip-recorded", code=1)[2] == 2


def test_code_that_changes_during_the_run_is_not_recorded(project):
    folder, run = project
    test = folder / "tests/test_part.py"
    change = f"open({str(folder / 'configs/below.py')!r}, 'w').write('ONE = 2')"
    test.write_text(test.read_text().replace("def test_absent():", f"def test_absent():\n    {change}"))
    run("--record")
    assert run("--skip-recorded", code=1)[2] == 2


def test_code_that_the_digest_does_not_cover_is_told(project):
    folder, run = project
    assert run("--record", file="tests/test_other.py", code=1) == [2, 0, 0]
    assert "test_hidden_import executes configs/hidden.py, which the digest does not cover" in run.output
    assert groups(folder) == set()
    text = (folder / "tests/test_other.py").read_text().replace("configs/other.py", "configs/hidden.py")
    (folder / "tests/test_other.py").write_text(text)
    run("--record", file="tests/test_other.py")
    assert groups(folder) == {"tests/test_other.py configs/hidden.py"}
    assert run("--skip-recorded", file="tests/test_other.py") == [1, 0, 0]


def covers(name: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in recorded.files(name)}


def test_a_group_depends_on_what_it_imports_and_on_no_other_family():
    norms = covers("tests/kernels_pallas/test_ops.py kernels_pallas/norms")
    assert {"kernels_pallas/norms/triton.py", "kernels_pallas/op.py", "kernels_pallas/pallas/triton.py"} <= norms
    assert {"tests/conftest.py", "kernels_pallas/__init__.py"} <= norms
    assert not any(file.startswith("kernels_pallas/attention/") for file in norms)
    mask = covers("tests/kernels_pallas/test_mask.py")
    assert "kernels_pallas/attention/tiles.py" in mask  # through the name that kernels_pallas exports
    assert not any(file.startswith("kernels_pallas/norms/") for file in mask)
    clipping = covers("tests/dito_jax/privacy/test_clipping.py")
    assert {"tests/dito_jax/privacy/conftest.py", "kernels_pallas/privacy/triton.py"} <= clipping


def test_a_digest_is_of_code_and_of_versions(monkeypatch):
    files = [ROOT / "tests" / "test_version.py"]
    today = dependencies.digest(files)
    assert dependencies.digest(files) == today
    assert dependencies.digest([*files, ROOT / "train.py"]) != today
    monkeypatch.setattr(dependencies, "installed", lambda: ("jax 1",))
    assert dependencies.digest(files) != today
