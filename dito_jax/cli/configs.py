"""`dito configs list|show|copy`: the built-in configs."""

import argparse
import difflib
from pathlib import Path

from dito_jax.bundled import built_in_configs, summary
from dito_jax.errors import UserError


def main(options: argparse.Namespace) -> None:
    """Lists the built-in configs, prints one, or copies one."""
    known = built_in_configs()
    if options.what == "list":
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {summary(path)}" for name, path in known.items()))
        return
    if options.name not in known:
        near = difflib.get_close_matches(options.name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
        raise UserError(f"no built-in config {options.name!r}; {hint}")
    text = known[options.name].read_text()
    if options.what == "show":
        print(text, end="")
        return
    path = Path(options.path or f"{options.name}.py")
    path = path / f"{options.name}.py" if path.is_dir() else path
    if path.exists():
        raise UserError(f"{path} exists already; give another path.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; make it first.")
    path.write_text(text)
    print(path)
