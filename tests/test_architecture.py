"""The architecture rules: which module may import which, how long files and functions may be, generated pages."""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SOURCES = [p for package in ("kernels_pallas", "dito_jax", "configs") for p in sorted((ROOT / package).rglob("*.py"))]
SOURCES += [ROOT / "train.py", *sorted((ROOT / "docs").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# A layer may import those below it, and its own neighbours.
LAYERS = (
    {"__main__", "cli", "run"},
    {"config", "overrides"},
    {"resilience", "privacy", "evaluation", "planning", "interop"},
    {"telemetry", "checkpointing"},
    {"training"},
    {"models", "diffusion", "data"},
    {"layers"},
    {"sharding", "distributed"},
    {"dims", "errors", "bundled", "version"},
)
DATA = {"mask", "rotation", "routing", "segments"}  # data types that a family's functions take beside arrays
PARTS = {
    "tiles",
    "heads",
    "programs",
    "scores",
    "blocks",
    "activations",
    "nonfinite",
    "rounding",
} | DATA  # shared code of a family's kernels
IMPLEMENTATIONS = {
    "triton": {"triton", "triton_jvp", "triton_rows", "triton_mlp"},
    "mosaic_gpu": {"mosaic_gpu", "mosaic_gpu_backward", "mosaic_gpu_mlp"},
    "others": {"cudnn", "ffi", "cutlass"},
}
KERNELS = set().union(*IMPLEMENTATIONS.values())


FAMILY_MAY_IMPORT = {  # inside a kernel family
    "api": {"reference", "cost", "cases"} | PARTS | KERNELS,
    "jvp": {"api", "reference", "cost", "cases"} | PARTS | KERNELS,
    **{kernel: {"cost"} | PARTS | files - {kernel} for files in IMPLEMENTATIONS.values() for kernel in files},
    # These use Triton kernels for the passes that they do not have themselves.
    **{kernel: {"cost"} | PARTS | KERNELS for kernel in IMPLEMENTATIONS["mosaic_gpu"] | {"cutlass"}},
    **{part: PARTS - {part} for part in PARTS},
    "reference": {"cost", "rounding"} | DATA,
    "cost": DATA,
    "cases": {"reference"} | DATA,
    "routers": {"routing"},
    "balance": {"routing"},
    "__init__": {"api", "jvp", "routers", "balance"} | DATA,
}
FAMILY_MAY_IMPORT_OUTSIDE = {"op", "arguments", "backend", "tuning", "hardware", "ffi", "pallas"}
FAMILIES = {p.parent.name for p in (ROOT / "kernels_pallas").glob("*/reference.py")}
KERNEL_LIBRARIES = {"jax", "numpy", "jaxtyping"}
PEERS = {"tokamax", "torch"}  # the libraries of bench's baselines; only bench/peers imports them, inside functions


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, absolute: (line, "kernels_pallas.op")."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if node.level and node.module is None:
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def violations(path: Path) -> list[str]:
    """What a file imports against the rules, a line each."""
    relative = path.relative_to(ROOT)
    rule = {"kernels_pallas": _kernel_rule, "dito_jax": _framework_rule, "configs": _config_rule}.get(relative.parts[0])
    if rule is None:
        return []
    return [
        f"{relative}:{line} imports {module}: {reason}"
        for line, module in imports(path)
        if (reason := rule(relative, module.split(".")))
    ]


def _kernel_rule(path: Path, module: list[str]) -> str | None:
    if module[0] != "kernels_pallas":
        allowed = KERNEL_LIBRARIES | _guests(path)
        known = module[0] in allowed or module[0] in sys.stdlib_module_names
        return None if known else "kernels_pallas may import only jax, numpy and jaxtyping"
    if path.parts[1] not in FAMILIES:
        return None
    family, file = path.parts[1], path.stem
    if module[1] != family:
        outside = len(module) > 1 and module[1] in FAMILY_MAY_IMPORT_OUTSIDE
        return None if outside else "a family may import op, backend and shared code, but no other family"
    allowed = FAMILY_MAY_IMPORT[file]
    return None if len(module) > 2 and module[2] in allowed else f"{file} may import {sorted(allowed)} of its family"


def _guests(path: Path) -> set[str]:
    """Further libraries that a file may import: those of the baselines, PyTorch in its bindings, jaxlib for DLPack."""
    if path.parts[1:3] == ("bench", "peers"):
        return PEERS
    return {"torch/functions.py": {"torch"}, "torch/dlpack.py": {"jaxlib"}}.get("/".join(path.parts[1:]), set())


def _framework_rule(path: Path, module: list[str]) -> str | None:
    if module[0] in ("train", "configs", "tests"):
        return "the framework knows no experiment"
    if module[0] == "kernels_pallas":
        public = module in (["kernels_pallas"], ["kernels_pallas", "bench"])
        return None if public else "import public names: from kernels_pallas import ..."
    if module[0] != "dito_jax" or len(module) == 1 or path.stem == "__init__":
        return None
    return None if _height(module[1]) >= _height(path.parts[1].removesuffix(".py")) else "it is of a higher layer"


def _config_rule(path: Path, module: list[str]) -> str | None:
    return "a config speaks of dito_jax" if module[0] == "kernels_pallas" else None


def _height(name: str) -> int:
    return next(height for height, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    assert not violations(path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels_pallas/norms/planted.py", "import flax"),
        ("kernels_pallas/planted.py", "import torch"),
        ("kernels_pallas/torch/functions.py", "import jaxlib"),
        ("kernels_pallas/bench/peers/attention.py", "import flax"),
        ("kernels_pallas/attention/heads.py", "from . import triton"),
        ("kernels_pallas/norms/reference.py", "from ..attention import api"),
        ("kernels_pallas/norms/cost.py", "from . import triton"),
        ("dito_jax/layers/planted.py", "from dito_jax.models.dit import DiT"),
        ("dito_jax/models/planted.py", "from dito_jax.training import step"),
        ("dito_jax/models/planted.py", "from kernels_pallas.norms.triton import forward"),
        ("dito_jax/data/planted.py", "import dito_jax.config"),
        ("configs/planted.py", "import kernels_pallas"),
    ],
)
def test_a_planted_violation_is_found(file, text, tmp_path, monkeypatch):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations(planted)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    relative = str(path.relative_to(ROOT))
    most = 500 if relative.startswith("kernels_pallas") else 600 if relative.startswith("tests") else 300
    most = 250 if relative == "train.py" else most
    assert len(text.splitlines()) <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            kernel_body = "kernel" in node.name and relative.startswith("kernels_pallas")
            longest = 100 if kernel_body or relative in ("train.py",) or relative.startswith("tests") else 50
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= longest, f"{relative}:{node.lineno} {node.name} has {length} lines"


def test_no_file_is_called_utils():
    assert not [p for p in SOURCES + TESTS if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_the_architecture_page_is_what_its_script_writes():
    script = runpy.run_path(str(ROOT / "docs" / "scripts" / "architecture.py"))
    stale = f"stale: run `{script['COMMAND']}`"
    assert script["PAGE"].read_text() == script["page"](), stale
    assert script["PICTURE"].read_text() == script["picture"](), stale


def test_every_file_says_what_it_does():
    first_sentence = runpy.run_path(str(ROOT / "docs" / "scripts" / "architecture.py"))["first_sentence"]
    silent = [str(p.relative_to(ROOT)) for p in SOURCES if p.read_text().strip() and not first_sentence(p)]
    assert not silent, f"no docstring: {silent}"


def test_the_layers_of_the_design_page_are_the_rules():
    [block] = re.findall(r"^## Layers\n+```text\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL | re.M)
    stale = "stale: run `python docs/scripts/architecture.py`"
    assert tuple(set(line.split()) for line in block.splitlines()) == ({"train.py", "configs"}, *LAYERS), stale
