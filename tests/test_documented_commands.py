"""Every command that README.md and docs/getting-started.md print, run as printed but for the sizes below.

The commands of the other pages are parsed by the parsers of the `dito` command, not run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
RUN_PAGES = (ROOT / "README.md", ROOT / "docs" / "getting-started.md")
PAGES = (*RUN_PAGES, *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ("log.md", "getting-started.md")))
# What is appended to each `dito train` that is run.
SMALL = [
    "--train.batch_size", "16", "--train.log_every", "1", "--model.depth", "1", "--model.width", "16",
    "--model.num_heads", "2", "--sample.steps", "1", "--sample.sampler", "euler", "--evaluation.num_samples", "40",
    "--evaluation.grid", "20", "--optimizer.warmup_steps", "0",
]  # fmt: skip
# What is put in place of what is printed.
REPLACED = {
    "--train.steps 2000": "--train.steps 3",
    "--train.steps 200": "--train.steps 2",
    "image_size 64": "image_size 16",
}
# Commands that are not run here: why.
NOT_RUN = {
    "make": ".ci/run has `make train` and `make test`; `make wheelhouse` has a test of its own",
    "source": "of what `make train` makes",
    "pip": "installs; the wheel has a test of its own",
}
PLACEHOLDERS = {"CONFIG": "digits", "RUN": "runs/digits", "digits.py": "digits"}


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks; a line that ends with a backslash goes on in the next."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def is_dito(command: str) -> bool:
    return command.startswith("dito ")


def to_run() -> list[list[str]]:
    """The arguments of every `dito` command of RUN_PAGES, in order, in small."""
    found = []
    for page in RUN_PAGES:
        for command in filter(is_dito, commands(page)):
            for printed, small in REPLACED.items():
                command = command.replace(printed, small)
            words = shlex.split(command, comments=True)[1:]
            if words[0] == "train" and "--help" not in words:
                words += SMALL if "--train.steps" in words else [*SMALL, "--train.steps", "2"]
            found.append(words)
    return found


# Runs `dito` with each of the arguments, then the Python of the page, in one process, and says how each ended.
DRIVER = """
import json, sys
from dito_jax.cli.main import main
commands, python = json.loads(sys.argv[1])
for number, arguments in enumerate(commands):
    sys.argv = ["dito", *arguments]
    print(f"### {number}", flush=True)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(f"### {number} {code}", flush=True)
exec(python)
print("images of shape", images.shape)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder with some images in it, as a user has them."""
    folder = tmp_path / "user"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "my_photos" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 255, (70, 80, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "my_photos" / name / f"{number}.png")
    return folder


@pytest.fixture
def environment(folder) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    cheap = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "DITO_CACHE": str(folder / "c")}
    return kept | cheap | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow(reason="one process runs some twenty commands, four short trainings among them")
def test_every_printed_command_ends_well(folder, environment):
    """All in one test, so that no other worker runs them too."""
    [python] = re.findall(r"```python\n(.*?)```", RUN_PAGES[1].read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([to_run(), python])],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    for number, words in enumerate(to_run()):
        said = re.search(rf"^### {number}$(.*?)^### {number} (.*?)$", done.stdout, re.DOTALL | re.MULTILINE)
        assert said and said[2] == "0", f"dito {' '.join(words)}\n{said and said[1][-3000:]}"
    assert done.stdout.splitlines()[-1] == "images of shape (2, 8, 8, 1)"  # what the page's Python draws

    run = folder / "runs" / "digits"
    for name in ("config.json", "metrics.jsonl", "samples/final.png", "eval.json", "report.md", "events.jsonl",
                 "goodput.jsonl", "goodput.png", "checkpoints", "tensorboard", "export/sampler"):  # fmt: skip
        assert (run / name).exists(), name
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "start"] == [0, 2], "the second `dito train` resumes"
    assert list((folder / "runs" / "images" / "samples").glob("*cat*.png"))


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_every_other_command_is_accounted_for(page):
    others = {command.split("#")[0].strip() for command in commands(page) if not is_dito(command)}
    assert not [command for command in others if command.split()[0] not in NOT_RUN]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in others:
        assert not command.startswith("make ") or command.split()[1] in targets, command
        assert set(re.findall(r"\[(\w+)\]", command)) <= extras.keys(), command


def parsed_commands() -> list[str]:
    """The `dito` and train.py commands of all pages, in blocks and in sentences, with values for placeholders."""
    found = {}
    for page in PAGES:
        sentences = " ".join(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).split())
        inline = [c for c in re.findall(r"`(dito \w[^`|]*)`", sentences) if PLACEHOLDERS.keys() & set(c.split())]
        for command in [*(c for c in commands(page) if " dito " in f" {c}" or "train.py" in c), *inline]:
            command = re.sub(r"^.*?(dito |python train\.py )", lambda match: match[1], command)
            words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
            found[shlex.join(word for word in words if word != "...")] = None
    return list(found)


@pytest.mark.parametrize("command", parsed_commands(), ids=lambda command: command.replace("/", ":")[:60])
def test_a_printed_command_is_accepted(command):
    from dito_jax.cli.arguments import parsed
    from dito_jax.config import load
    from dito_jax.overrides import override
    from dito_jax.run.arguments import train_arguments

    words = shlex.split(command)
    words = words[1:] if words[0] == "dito" else ["train", *words[2:]]
    try:
        if words[0] == "train":
            train_arguments(words[1:])
        else:
            options = parsed(words)
            if options.overrides:
                override(load(getattr(options, "config", None) or options.subject), options.overrides)
    except SystemExit as end:
        assert not end.code and {"--help", "--version"} & set(words)
