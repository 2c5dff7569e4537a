"""README.md: its example runs, and what it links to is there."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_is_twenty_lines(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    example = example.replace('preset("S/2"', 'preset("S/16"').replace("jnp.zeros((8, 32", "jnp.zeros((2, 32")
    exec(example.replace("jnp.arange(8)", "jnp.arange(2)"), {})
    assert re.fullmatch(r"[\d,]+ parameters, [\d,]+ flops an image, loss \d\.\d+\n", capsys.readouterr().out)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_test_that_is_named_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "privacy.md").read_text()))
    there = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))
    assert len(named) > 20 and not named - there


def test_every_command_names_a_file_that_is_there():
    named = re.findall(r"(?:configs|docs|tests|kernels_pallas|dito_jax)/[\w/]+\.(?:py|md|json|png)", README)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
