"""The repository's files on which a file of Python code depends, and the digest of them and of what is installed.

`from package import name` depends on the module of the package that defines the name. What else the package's
`__init__.py` imports counts for `import package` and for a name that `__init__.py` itself defines.
"""

import ast
import functools
import hashlib
import itertools
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Data that code reads without an import.
DATA = ("kernels_pallas/tuned/*.json",)
REGISTRY = ROOT / "kernels_pallas" / "__init__.py"
NOT_OF_TESTS = ("ruff", "pyright", "hatchling", "mkdocs-material", "mkdocstrings-python")


def closure(files: Iterable[Path], registry: bool = True) -> set[Path]:
    """The files, and all files of the repository that they import, directly or not, in functions too.

    Args:
      registry: False does not follow the imports of `kernels_pallas/__init__.py`, which has a tuple of all operations.
    """
    followed: set[Path] = set()
    found, todo = set(files), list(files)
    while todo:
        file = todo.pop()
        if file not in followed and (registry or file != REGISTRY):
            followed.add(file)
            for imported, follow in _imports(file) if file.suffix == ".py" else ():
                found.add(imported)
                todo += [imported] if follow else []
    return found


@functools.cache
def _imports(file: Path) -> frozenset[tuple[Path, bool]]:
    """The files that a file imports, and whether what those import counts too."""
    found: set[tuple[Path, bool]] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {(path, True) for alias in node.names for path in _module(alias.name.split("."))}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found |= _definition(_package(file, node), alias.name)
    return frozenset(found)


def _package(file: Path, node: ast.ImportFrom) -> list[str]:
    """The absolute name of the module that `from module import ...` in a file means."""
    above = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
    return [*above, *(node.module.split(".") if node.module else ())]


def _module(parts: list[str]) -> set[Path]:
    """The file of a module of this repository; empty for another module."""
    path = ROOT.joinpath(*parts)
    return {file for file in (path.with_suffix(".py"), path / "__init__.py") if parts and file.is_file()}


def _definition(package: list[str], name: str) -> set[tuple[Path, bool]]:
    """The file that defines a name of a package: `name` may be a module, or be imported by `__init__.py`."""
    if module := _module([*package, name]):
        return {(path, True) for path in module}
    files = _module(package)
    for init in (file for file in files if file.name == "__init__.py"):
        for node in ast.walk(ast.parse(init.read_bytes())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if name == (alias.asname or alias.name):
                    return {(init, False)} | _definition(_package(init, node), alias.name)
    return {(path, True) for path in files}


def digest(files: Iterable[Path]) -> str:
    """Twelve hex digits of the code of the files, of `DATA`, and of the versions of what is installed.

    Comments, docstrings and formatting of Python code do not count.
    """
    from kernels_pallas import measured  # after the tests' import hook

    text = hashlib.sha256("\n".join(installed()).encode())
    for path in [*sorted(files), *sorted(file for pattern in DATA for file in ROOT.glob(pattern))]:
        text.update(f"\0{path.relative_to(ROOT)}\0".encode() + measured.content(path))
    return text.hexdigest()[:12]


@functools.cache
def installed() -> tuple[str, ...]:
    """The versions of Python, of the C++ compiler, and of each package for which pyproject.toml asks and of jaxlib."""
    from kernels_pallas.ffi import libraries

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = ["jaxlib", *project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = sorted({re.findall(r"^[\w.-]+", line)[0] for line in wanted})
    return (
        f"Python {sys.version_info.major}.{sys.version_info.minor}",
        platform.machine(),
        _first_line([libraries.compiler("cpu"), "--version"]),
        *(f"{name} {_version(name)}" for name in names if name not in NOT_OF_TESTS),
    )


def _first_line(command: list) -> str:
    if command[0] is None:
        return "no C++ compiler"
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
