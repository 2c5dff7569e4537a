"""Images in tar files in the layout of WebDataset: KEY.jpg with KEY.cls or KEY.json, read by random access.

Each shard is listed once per process; then an example is one read at its offset. Compressed archives have no random
access and are refused.
"""

import collections
import dataclasses
import functools
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator

import numpy as np

from dito_jax.data.decode import SUFFIXES
from dito_jax.data.images import ImageData, ImageSource, check_options
from dito_jax.data.labels import classes_of, numbered, owner_numbers
from dito_jax.data.names import Names
from dito_jax.data.shards import of_split, shards
from dito_jax.data.sources import DataError, Split


@dataclasses.dataclass(frozen=True)
class WebDatasetData(ImageData):
    """Images in tar files in the layout of WebDataset.

    `path` is a .tar file, a folder of .tar files, or a glob of them. "{split}" in it stands for train, and for
    validation, val or test: "shards/{split}-*.tar". Without a split one example in twenty is held out.
    """

    label_key: str = "cls"
    """Extension of the member with the label, a class number or name; "json.FIELD" is a field of KEY.json."""
    owner_key: str | None = None
    """The same for the owner of an image, for privacy.images_per_user."""

    def open(self, split: Split) -> ImageSource:
        """The images of one split.

        Raises:
          DataError: the files are missing or damaged, or an image has no label.
        """
        check_options(self)
        if not self.label_key or self.owner_key == "":
            raise DataError("label_key, owner_key: wanted the extension of a member, such as cls or json.label.")
        files, own = shards(self.path, split, (".tar",))
        stored = _indexed(files, self)
        train = stored if split == "train" or not own else _indexed(shards(self.path, "train", (".tar",))[0], self)
        classes = classes_of(train.label_texts)
        labels = numbered(stored.label_texts, classes, self.path)[np.frombuffer(stored.labels, np.int32)]
        chosen = of_split(len(stored.names), split, own_files=own)
        if not len(chosen):
            raise DataError(f"{self.path}: no images in the {split} split.")
        owners = None if self.owner_key is None else owner_numbers(stored.owners)[chosen]
        kinds = ", ".join(f"{number:,} x {kind}" for kind, number in sorted(stored.left_out.items()))
        notes = [f"{self.path}: left out {kinds}."] if kinds else []
        return ImageSource(self, split, _Members(stored, labels, chosen), classes, owners=owners, notes=notes)


class _Index:
    """Where the images of some shards are, with the text of their labels."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.names, self.file = Names(), array("i")
        self.offsets, self.sizes = array("q"), array("q")
        self.labels, self.label_texts = array("i"), list[str]()
        self.owners: list[str] = []
        self.left_out = collections.Counter[str]()
        self._numbers: dict[str, int] = {}

    def add(self, name: str, member: tarfile.TarInfo, label: str, owner: str | None) -> None:
        """Adds an image of the last file."""
        self.names.append(name)
        self.file.append(len(self.files) - 1)
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size)
        if label not in self._numbers:
            self._numbers[label] = len(self.label_texts)
            self.label_texts.append(label)
        self.labels.append(self._numbers[label])
        if owner is not None:
            self.owners.append(owner)


class _Members:
    """The images of a split."""

    def __init__(self, index: _Index, labels: np.ndarray, chosen: np.ndarray):
        self._index, self._labels, self._chosen = index, labels, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        number = int(self._chosen[index])
        return f"{self._index.files[self._index.file[number]]}: {self._index.names[number]}"

    def opened(self, index: int) -> io.BytesIO:
        number, of = int(self._chosen[index]), self._index
        with open(of.files[of.file[number]], "rb", buffering=0) as file:
            file.seek(of.offsets[number])
            return io.BytesIO(file.read(of.sizes[number]))

    def label(self, index: int) -> int:
        return int(self._labels[self._chosen[index]])


def _indexed(files: list[str], config: WebDatasetData) -> _Index:
    try:
        changed = tuple(os.stat(file).st_mtime_ns for file in files)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give readable .tar files.") from error
    return _listed(tuple(files), changed, config.label_key, config.owner_key)


@functools.lru_cache(maxsize=4)  # a run opens its data several times
def _listed(files: tuple[str, ...], _changed: tuple[int, ...], label_key: str, owner_key: str | None) -> _Index:
    """Lists all shards; raises DataError if one is damaged."""
    index = _Index()
    for file in files:
        index.files.append(file)
        try:
            with tarfile.open(file, "r:") as archive:
                for key, members in _samples(archive):
                    _add(index, archive, key, members, label_key, owner_key)
        except (OSError, tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{file}: not a readable tar file ({error}); give uncompressed .tar files and write damaged ones again."
            ) from error
    return index


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The members of each sample by their extension: neighbours whose names agree up to the first dot of the file."""
    size = os.stat(str(archive.name)).st_size
    key, members = "", dict[str, tarfile.TarInfo]()
    while (member := archive.next()) is not None:
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # keeps no list of all members
        if member.offset_data + member.size > size:
            raise DataError(f"{archive.name}: cut off within {member.name}; copy or write this shard again.")
        if not member.isfile():
            continue
        folder, file = os.path.split(member.name)
        stem, _, extension = file.partition(".")
        here = os.path.join(folder, stem)
        if here != key and members:
            yield key, members
            members = {}
        key = here
        members[extension.lower()] = member
    if members:
        yield key, members


def _add(
    index: _Index,
    archive: tarfile.TarFile,
    key: str,
    members: dict[str, tarfile.TarInfo],
    label_key: str,
    owner_key: str | None,
) -> None:
    """Adds a sample to the index."""
    images = [extension for extension in members if f".{extension}" in SUFFIXES]
    if not images:
        index.left_out["sample without an image"] += 1
        return
    if len(images) > 1:
        raise DataError(f"{archive.name}: {key} has several images (.{', .'.join(images)}); wanted one per sample.")
    label = _text(archive, key, members, label_key)
    owner = None if owner_key is None else _text(archive, key, members, owner_key)
    index.add(f"{key}.{images[0]}", members[images[0]], label, owner)


def _text(archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], wanted: str) -> str:
    """The text of a member of a sample, or of a field of its .json."""
    extension, _, field = wanted.partition(".") if wanted.startswith("json.") else (wanted, "", "")
    content = None
    if extension in members and (file := archive.extractfile(members[extension])) is not None:
        content = file.read().decode().strip()
    if content and field:
        content = str(json.loads(content).get(field, ""))
    if not content:
        raise DataError(
            f"{archive.name}: {key} has no {wanted} (it has .{', .'.join(members)}); set data.label_key, and "
            "data.owner_key for owners."
        )
    return content
