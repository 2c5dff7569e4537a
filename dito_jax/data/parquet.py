"""Images in Parquet or Arrow files with an image column and a label column, in the layout of Hugging Face data sets.

Arrow files are memory-mapped. A Parquet file can only be read by whole row groups, so it is copied once to an Arrow
file in a cache folder, which is then memory-mapped.
"""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dito_jax.data.cache import cached_path
from dito_jax.data.decode import Opened, UnreadableImage
from dito_jax.data.images import ImageData, ImageSource, check_options
from dito_jax.data.labels import classes_of, numbered, owner_numbers
from dito_jax.data.shards import of_split, shards
from dito_jax.data.sources import DataError, Split


if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
ROWS = 256  # of a record batch of an Arrow copy


@dataclasses.dataclass(frozen=True)
class ParquetData(ImageData):
    """Images in Parquet or Arrow files, in the layout of Hugging Face data sets. Needs dito_jax[parquet].

    `path` is a .parquet or .arrow file, a folder of them, or a glob. "{split}" in it stands for train, and for
    validation, val or test. Without a split one example in twenty is held out.
    """

    image_column: str = "image"
    """Column of encoded images: bytes, or a struct with the field bytes, and path for images in files of their own."""
    label_column: str = "label"
    """Column of class numbers or class names; names of ClassLabel features are used."""
    owner_column: str | None = None
    """Column with the owner of each image, for privacy.images_per_user."""
    cache_dir: str | None = None
    """Folder for the Arrow copies of Parquet files; default: $DITO_CACHE/data, or ~/.cache/dito_jax/data."""

    def open(self, split: Split) -> ImageSource:
        """The images of one split.

        Raises:
          DataError: pyarrow is not installed, or the files are missing or lack a column.
        """
        check_options(self)
        files, own = shards(self.path, split, SUFFIXES)
        table = _table(files, self)
        train = table if split == "train" or not own else _table(shards(self.path, "train", SUFFIXES)[0], self)
        labels, names = _texts(table, self.label_column, self.path), _class_names(train, self.label_column)
        classes = names or classes_of(_texts(train, self.label_column, self.path))
        by_number = names and all(label.lstrip("-").isdecimal() for label in labels)
        numbers = numbered(labels, [str(n) for n in range(len(classes))] if by_number else classes, self.path)
        chosen = of_split(table.num_rows, split, own_files=own)
        if not len(chosen):
            raise DataError(f"{self.path}: no images in the {split} split.")
        column = self.owner_column
        owners = None if column is None else owner_numbers(_texts(table, column, self.path))[chosen]
        stored = _Rows(table, self.image_column, files, numbers, chosen)
        return ImageSource(self, split, stored, classes, owners=owners)


class _Rows:
    """The images of a split."""

    def __init__(self, table: "pa.Table", column: str, files: list[str], labels: np.ndarray, chosen: np.ndarray):
        self._labels, self._chosen, self._column = labels, chosen, column
        self._folder = os.path.dirname(files[0])
        self._files = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}"
        self._chunks = table.column(column).chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        return f"{self._files}: row {self._chosen[index]}"

    def opened(self, index: int) -> Opened:
        row = int(self._chosen[index])
        place = int(np.searchsorted(self._ends, row, side="right"))
        chunk = self._chunks[place]
        value = chunk[row - int(self._ends[place]) + len(chunk)].as_py()
        path = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is not None:
            return io.BytesIO(content)
        if path:
            return os.path.join(self._folder, path)
        raise UnreadableImage(self.name(index), f"the column {self._column} is empty")

    def label(self, index: int) -> int:
        return int(self._labels[self._chosen[index]])


def _table(files: list[str], config: ParquetData) -> "pa.Table":
    """The columns that are read, of all files one after the other; the images are memory-mapped.

    Raises:
      DataError: a file is not readable, or lacks a column.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(
            "--data parquet needs pyarrow: pip install pyarrow, or dito_jax with its extra `parquet`."
        ) from None
    wanted = [config.image_column, config.label_column, *([config.owner_column] if config.owner_column else [])]
    tables = []
    for file in files:
        try:
            arrow = file if file.endswith(".arrow") else str(_copied(file, wanted, config.cache_dir))
            table = _mapped(arrow)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{file}: not readable as Parquet or Arrow ({reason}); write the file again.") from error
        if missing := [name for name in wanted if name not in table.column_names]:
            raise DataError(
                f"{file}: no column {missing[0]!r}; it has {', '.join(table.column_names)}: set data.image_column, "
                "data.label_column or data.owner_column."
            )
        tables.append(table.select(wanted))
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise DataError(f"{files[0]} ... {files[-1]}: the columns of these files have different types.") from error
    kind = table.schema.field(config.image_column).type
    encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        raise DataError(
            f"{files[0]}: column {config.image_column!r} is {kind}; wanted encoded images: binary, or a struct with "
            "the field bytes."
        )
    return table


def _mapped(file: str) -> "pa.Table":
    """An Arrow file or stream as a table that is memory-mapped."""
    import pyarrow as pa

    source = pa.memory_map(file)
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()  # what `datasets` writes into its cache


def _copied(file: str, columns: list[str], cache_dir: str | None) -> Path:
    """The Arrow copy of some columns of a Parquet file; written if there is none of the file as it is now."""
    import pyarrow as pa
    from pyarrow import parquet

    copy = cached_path(cache_dir, file, columns, suffix=".arrow")
    if copy.exists():
        return copy
    with parquet.ParquetFile(file) as whole:
        present = [name for name in columns if name in whole.schema_arrow.names]
        schema = pa.schema([whole.schema_arrow.field(name) for name in present], whole.schema_arrow.metadata)
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_suffix(f".{os.getpid()}.partial")
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in whole.iter_batches(batch_size=ROWS, columns=present):
                    writer.write_batch(batch.select(present))
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy


def _texts(table: "pa.Table", column: str, where: str) -> list[str]:
    """A column of integers or names as text.

    Raises:
      DataError: it has other values, or none in a row.
    """
    import pyarrow as pa

    kind, values = table.schema.field(column).type, table.column(column)
    if values.null_count:
        raise DataError(f"{where}: column {column!r} is empty in {values.null_count:,} rows; fill or remove them.")
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} is {kind}; wanted integers or names.")
    return [str(value) for value in values.to_pylist()]


def _class_names(table: "pa.Table", column: str) -> list[str]:
    """The names of a ClassLabel feature, from the metadata of the schema; empty without."""
    content = (table.schema.metadata or {}).get(b"huggingface")
    feature: Any = json.loads(content)["info"]["features"].get(column, {}) if content else {}
    return list(feature.get("names", ())) if isinstance(feature, dict) else []
