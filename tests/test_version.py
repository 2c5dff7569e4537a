"""The version and what it changed: pyproject.toml, CITATION.cff and CHANGELOG.md agree."""

import tomllib
from pathlib import Path

from dito_jax.config import RENAMED


ROOT = Path(__file__).parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = [line for line in CHANGELOG.splitlines() if line.startswith("## ") and line != "## Unreleased"]
    assert headings[0] == f"## {version}"


def test_the_changelog_has_every_renamed_field():
    for names in RENAMED.values():
        for old, new in names.items():
            [row] = [row for row in CHANGELOG.splitlines() if row.startswith("|") and f"{old}`" in row.split("|")[1]]
            assert f"{new}`" in row.split("|")[2]
