"""The files beside the package that an installation has too: train.py and the built-in configs.

A wheel holds them in dito_jax/_bundled/ (pyproject.toml says so); in a checkout, and in an editable installation of
one, they lie beside the package.
"""

import ast
import difflib
from pathlib import Path

from dito_jax.errors import UserError


_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_bundled"
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent

TRAIN = _FOLDER / "train.py"


def built_in_configs() -> dict[str, Path]:
    """The built-in configs by name: {"digits": .../configs/digits.py, ...}."""
    return {path.stem: path for path in sorted((_FOLDER / "configs").glob("*.py"))}


def config_path(config: str) -> Path:
    """The file of a config that is given as a path, or as the name of a built-in config.

    Raises:
      UserError: there is neither such a file nor such a built-in config.
    """
    built_in = built_in_configs()
    if Path(config).is_file():
        return Path(config)
    if config in built_in:
        return built_in[config]
    known = [*built_in, *(str(path) for path in Path("configs").glob("*.py"))]
    near = difflib.get_close_matches(config, known, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"no config file {config!r}, and no built-in config of that name.{hint} `dito configs list` has all."
    )


def summary(path: Path) -> str:
    """The first line of a config file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
