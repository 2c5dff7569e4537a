"""`dito data check`: reads every example of a data set before a run does."""

import argparse
import glob
from pathlib import Path
from typing import Any

from dito_jax.bundled import built_in_configs
from dito_jax.config import load
from dito_jax.data import SPLIT_NAMES, check_examples, notes
from dito_jax.errors import UserError
from dito_jax.overrides import override
from dito_jax.run.command_line import say


# The kind of data by the suffix of the files; a folder without such files has class folders of images.
KINDS = {".npz": "latents", ".arrayrecord": "latents", ".tar": "webdataset", ".parquet": "parquet", ".arrow": "parquet"}
SIZE = "64"  # of a path without a config


def main(options: argparse.Namespace) -> None:
    """Prints a line for each example that cannot be read, and the number of examples of each split.

    Raises:
      UserError: the data cannot be opened, or an example cannot be read.
    """
    data = _data(options.subject, options.overrides)
    bad = 0
    for split in SPLIT_NAMES:
        source = data.open(split)
        if split == "train":
            for line in notes(source):
                say(line)
        checked = check_examples(source, print)
        animated = f", {checked.animated:,} animated (the first frame is used)" if checked.animated else ""
        classes = f"{source.num_classes:,} classes"
        print(f"{split}: {checked.examples:,} examples, {classes}, {checked.bad:,} unreadable{animated}")
        bad += checked.bad
    if bad:
        raise UserError(
            f"{options.subject}: {bad:,} unreadable; repair or remove them, or let a run skip as many with "
            "--data.max_unreadable."
        )


def _data(subject: str, overrides: list[str]) -> Any:
    """The data of a config; or those at a path, of the kind that its files have."""
    path = Path(subject).expanduser()
    is_config = subject in built_in_configs() or path.suffix == ".py"
    if not is_config and "/" in subject and not path.exists() and not set("{*?[") & set(subject):
        raise UserError(f"{subject}: no such file or folder of data.")
    if is_config or not (path.exists() or set("{*?[") & set(subject)):
        return override(load(subject), overrides).data
    files = [subject] if not path.is_dir() else glob.glob(f"{glob.escape(str(path))}/*.*")
    kinds = {KINDS[Path(file).suffix] for file in files if Path(file).suffix in KINDS}
    kind = min(kinds, default="image-folder")
    size = [] if kind == "latents" or "--data.image_size" in overrides else ["--data.image_size", SIZE]
    return override(load("images"), ["--data", kind, "--data.path", subject, *size, *overrides]).data
