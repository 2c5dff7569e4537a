"""Every kernel compiles for the GPUs it is for: without spills, within shared memory, on their matrix units.

Compiling them all takes a quarter of an hour, and gives the same for the same source: what is recorded of today's
source and compilers (kernels_pallas/bench/compiled.py) is read, the rest is compiled. `--everything` compiles all.
"""

import ast
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import deviceless, hardware, measured
from kernels_pallas.bench import compiled
from kernels_pallas.op import Op


ROOT = Path(kernels_pallas.__file__).parents[1]
OPS = {op.name: op for op in kernels_pallas.OPS}
FAMILIES = compiled.families(kernels_pallas.OPS)
MATRIX_UNIT = {"h200": ("wgmma", "mma_sync"), "a100": ("mma_sync", "wgmma")}  # its own, and what it must not fall to
# Which implementation is chosen; names alone; checks of arguments before an implementation is called.
NOT_OF_THE_CODE = {"measured.py", "__init__.py", "arguments.py"}

pytestmark = pytest.mark.deviceless


def inspect(*words: str) -> list[dict]:
    command = [sys.executable, "-m", "kernels_pallas.inspect", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads(done.stdout)


@functools.cache
def compiled_now(family: str) -> list[dict]:
    names = [op.name for op in FAMILIES[family]]
    return [row for device in compiled.RECORDED for row in inspect(*names, "--device", device)]


@pytest.fixture
def rows(request, family):
    """What the inspector says of every kernel of the family at every case, on each GPU that is recorded."""
    if reason := deviceless.why_not():
        pytest.skip(reason)
    if compiled.is_current(family, FAMILIES[family]) and not request.config.getoption("everything"):
        return compiled.read(family)
    return compiled_now(family)


def of_each_family(test):
    return pytest.mark.parametrize("family", FAMILIES)(test)


def on(gpu: hardware.Hardware) -> jax.sharding.AbstractMesh:
    """A mesh that says which GPU is meant."""
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, platform="gpu", num_cores=gpu.cores)
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def wanted(op: Op, device: str) -> set[tuple[str, ...]]:
    """(op, kernel, case, pass, device) of all that is to have a row."""
    with jax.sharding.use_abstract_mesh(on(hardware.GPUS[device])):
        return {
            (op.name, name, case, pass_, device)
            for name, kernel in op.kernels.items()
            for case, of in op.cases.items()
            if not kernel.external and not kernel.unsupported(*of.arrays, **of.static)
            for pass_ in op.passes
        }


@of_each_family
def test_compiles_without_spills(family, rows):
    all_wanted = set().union(*(wanted(op, device) for op in FAMILIES[family] for device in compiled.RECORDED))
    assert all_wanted == {tuple(row[key] for key in ("op", "kernel", "case", "pass", "device")) for row in rows}
    limits = {name: gpu.shared_memory for name, gpu in hardware.GPUS.items()}
    assert not [r for r in rows if r["spill_bytes"] or r["shared_memory_bytes"] > limits[r["device"]]]
    assert all(int(r["machine_code"].partition(":")[0]) > 10 for r in rows), "a hash of no instructions"


@of_each_family
def test_matrix_products_use_the_best_unit_of_the_device(family, rows):
    """Each bfloat16 kernel of a model's size whose definition multiplies matrices."""
    for row in rows:
        present, absent = MATRIX_UNIT[row["device"]]
        case = OPS[row["op"]].cases[row["case"]]
        adds_up = row["function"].partition("__")[0].endswith(("_merge", "_sum"))  # multiplies no matrices
        if adds_up or case.tiny or jax.tree.leaves(case.arrays)[0].dtype != jnp.bfloat16:
            continue
        if multiplies_matrices(row["op"], row["case"]):
            assert row[present] > 0 and row[absent] == 0, row


@pytest.mark.parametrize("family", ["norms"])
def test_rows_move_16_bytes_at_a_time(family, rows):
    """Where a row is as long as a model's. The statistics of a row move one number at a time."""
    rows = [row for row in rows if not row["case"].startswith("tiny")]
    assert len({row["case"] for row in rows}) >= 8
    assert not [row for row in rows if row["wide_share"] < 0.75]


@functools.cache
def multiplies_matrices(name: str, case: str) -> bool:
    of = OPS[name].cases[case]
    definition = functools.partial(OPS[name], implementation="xla", **of.static)
    return "dot_general" in str(jax.make_jaxpr(definition)(*of.arrays))


@of_each_family
def test_what_is_compiled_is_recorded(family):
    if reason := deviceless.why_not():
        pytest.skip(reason)
    names = " ".join(op.name for op in FAMILIES[family])
    message = f"{compiled.path(family).relative_to(ROOT)} is not of today's source and compilers. Commit what this"
    message += f" writes: python -m kernels_pallas.inspect --record {names}"
    assert compiled.is_current(family, FAMILIES[family]), message


def test_a_record_is_what_the_compiler_says():
    """Of one kernel, so that the records are known to be of this compiler, down to each instruction."""
    if reason := deviceless.why_not():
        pytest.skip(reason)
    name, case = "modulated_norm", "tiny_layer"
    for device in compiled.RECORDED:
        recorded = [r for r in compiled.read("norms") if (r["op"], r["case"], r["device"]) == (name, case, device)]
        assert inspect(name, "--case", case, "--device", device) == recorded


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's files that its digests are of."""
    copy = tmp_path / "kernels_pallas"
    shutil.copytree(compiled.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "results"))
    monkeypatch.setattr(compiled, "PACKAGE", copy)
    monkeypatch.setattr(compiled.tuning, "SHIPPED", copy / "tuned")
    monkeypatch.setattr(measured, "__file__", str(copy / "measured.py"))
    monkeypatch.setattr(measured, "family", lambda op, real=measured.family: copy / real(op).name)
    monkeypatch.setattr(compiled, "compilers", lambda: ("jax 1",))
    return copy


def test_a_digest_is_of_the_code_and_not_of_its_words(package, monkeypatch):
    today = compiled.digest(FAMILIES["norms"])
    file = package / "norms" / "triton.py"
    text = file.read_text()
    file.write_text("# A comment.\n\n" + text.replace('"""', '"""Said otherwise. ', 1))
    assert file.read_text() != text and compiled.digest(FAMILIES["norms"]) == today
    places = ["norms/triton.py", "norms/cases.py", "pallas/triton.py", *compiled.SHARED]
    for path in (package / place for place in places):
        before = path.read_text()
        path.write_text(before + "\nplanted = 1\n")
        assert compiled.digest(FAMILIES["norms"]) != today, path
        path.write_text(before)
    (package / "attention" / "triton.py").write_text("planted = 1")  # another family's
    assert compiled.digest(FAMILIES["norms"]) == today
    (package / "tuned").mkdir(exist_ok=True)
    (package / "tuned" / "nvidia_h200.json").write_text("[]")
    assert compiled.digest(FAMILIES["norms"]) != today
    (package / "tuned" / "nvidia_h200.json").unlink()
    monkeypatch.setattr(compiled, "compilers", lambda: ("jax 2",))
    assert compiled.digest(FAMILIES["norms"]) != today


def test_digests_cover_all_that_a_family_imports():
    covered = {compiled.PACKAGE / name for name in compiled.SHARED} | set((compiled.PACKAGE / "pallas").glob("*.py"))
    for family in FAMILIES:
        mine = set((compiled.PACKAGE / family).glob("*.py"))
        seen, found = set(mine), list(mine)
        while found:
            for file in imported(found.pop()) - seen:
                seen.add(file)
                found.append(file)
        left_out = {file for file in seen - covered - mine if file.name not in NOT_OF_THE_CODE}
        assert not left_out, f"{family}: compiled.SHARED lacks {sorted(map(str, left_out))}"


def imported(file: Path) -> set[Path]:
    """The files of the package that one imports by `from . import`, `from .. import` or with a module's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in (base, *(base / alias.name for alias in node.names)):
                found |= {path.with_suffix(".py")} if path.with_suffix(".py").is_file() else set()
    return found
