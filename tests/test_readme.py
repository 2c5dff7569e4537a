"""README.md and docs/: the example runs, links and names exist, generated parts are current, usual words are found."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = runpy.run_path(str(ROOT / "docs" / "scripts" / "results.py"))
# What people search for: the beginning of a word in README.md or docs/index.md; capitals, where there are any, count.
WORDS = (
    "EMA", "FSDP", "gradient accumulation", "tensor parallel", "data parallel", "expert parallel", "multi-node",
    "fine-tun", "inference", "pretrained", "class-conditional", "autoencoder", "safetensors", "TensorBoard",
    "fault injection", "membership inference", "load balanc", "classifier-free guidance", "LoRA", "Slurm", "Poisson",
    "pip install", "mixed precision", "checkpoint", "DP-SGD",
)  # fmt: skip


def test_the_example_runs_is_twenty_lines_and_has_a_loss(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    assert 'preset("S/2"' in example and "(8, 32" in example and "jnp.arange(8)" in example
    small = example.replace('preset("S/2"', 'preset("S/16"').replace("(8, 32", "(2, 32")
    exec(small.replace("jnp.arange(8)", "jnp.arange(2)"), {})
    printed = capsys.readouterr().out
    found = re.fullmatch(r"[\d,]+ parameters, [\d,]+ flops an image, loss (\d+\.\d+)\n", printed)
    assert found and float(found[1]) > 0.1, printed


def test_the_readme_fits_a_front_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(page):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [path for path in PAGES if path.name != "log.md"], ids=lambda path: path.name)
def test_every_file_that_is_named_is_there(page):
    named = re.findall(
        r"(?<![\w/])(?:configs|docs|tests|kernels_pallas|dito_jax)/[\w/]+\.(?:py|md|json|png)", page.read_text()
    )
    example = {"kernels_pallas/energy", "tests/kernels_pallas/test_energy"}  # what docs/extending.md adds
    assert not [p for p in named if not (ROOT / p).exists() and not p.startswith(tuple(example))]


def test_every_test_that_is_named_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "privacy.md").read_text()))
    there = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))
    assert len(named) > 20 and not named - there


def test_the_layout_names_every_folder():
    layout = README.split("## Layout")[1].split("```")[1]
    folders = {p.parent.name for package in ("dito_jax", "kernels_pallas") for p in ROOT.glob(f"{package}/*/*.py")}
    assert not [folder for folder in folders if not re.search(rf"\b{folder}\b", layout)]


@pytest.mark.parametrize("word", WORDS)
def test_usual_words_are_found(word):
    text = " ".join((README + (ROOT / "docs" / "index.md").read_text()).split())
    assert re.search(rf"\b{word}", text, re.IGNORECASE if word.islower() else 0)


def test_the_benchmark_tables_are_of_the_committed_measurements():
    stale = f"stale: run `{RESULTS['COMMAND']}`"
    assert RESULTS["readme"](README) == README, stale
    assert RESULTS["PAGE"].read_text() == RESULTS["page"](), stale


def test_the_benchmark_picture_is_of_the_committed_measurements():
    with Image.open(RESULTS["PICTURE"]) as picture:
        assert picture.info["Comment"] == RESULTS["source_digest"](), f"stale: run `{RESULTS['COMMAND']}`"
