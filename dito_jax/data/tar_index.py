"""Lists the samples of a tar file in the layout of WebDataset: where each image is, its label and its owner.

The list of a shard is kept in a cache folder, because listing reads the header of every member.
"""

import contextlib
import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from dito_jax.data.cache import cached_path
from dito_jax.data.decode import SUFFIXES
from dito_jax.data.sources import DataError


VERSION = 1  # of the cached lists
Members = dict[str, tarfile.TarInfo]  # of a sample, by extension


@dataclasses.dataclass
class Shard:
    """The images of one tar file; item i of each list is of image i."""

    names: list[str] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)  # bytes from the beginning of the file
    sizes: list[int] = dataclasses.field(default_factory=list)  # bytes
    labels: list[str] = dataclasses.field(default_factory=list)
    owners: list[str] = dataclasses.field(default_factory=list)  # empty if none were asked for
    without_image: int = 0  # samples that were left out


def index(file: str, label_key: str, owner_key: str | None, cache_dir: str | None) -> Shard:
    """The samples of a shard, from the cache if the shard has not changed.

    Raises:
      DataError: the file is damaged or compressed, or a sample has no label or several images.
    """
    try:
        cached = cached_path(cache_dir, file, VERSION, label_key, owner_key, suffix=".json")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give readable .tar files.") from error
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or one that was cut off
        return Shard(**json.loads(cached.read_text()))
    shard = _listed(file, label_key, owner_key)
    with contextlib.suppress(OSError):  # a read-only or full disk: it is listed again at the next start
        _write(cached, json.dumps(dataclasses.asdict(shard)))
    return shard


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _listed(file: str, label_key: str, owner_key: str | None) -> Shard:
    shard = Shard()
    try:
        with tarfile.open(file, "r:") as archive:
            for key, members in _samples(archive):
                _add(shard, archive, key, members, label_key, owner_key)
    except DataError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: not a readable tar file ({error}); give uncompressed .tar files and write damaged ones again."
        ) from error
    return shard


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """The members of each sample by their extension: neighbours whose names agree up to the first dot of the file."""
    size = os.stat(str(archive.name)).st_size
    key, members = "", Members()
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
            members = Members()
        key = here
        members[extension.lower()] = member
    if members:
        yield key, members


def _add(
    shard: Shard, archive: tarfile.TarFile, key: str, members: Members, label_key: str, owner_key: str | None
) -> None:
    images = [extension for extension in members if f".{extension}" in SUFFIXES]
    if not images:
        shard.without_image += 1
        return
    if len(images) > 1:
        raise DataError(f"{archive.name}: {key} has several images (.{', .'.join(images)}); wanted one per sample.")
    image = members[images[0]]
    shard.names.append(f"{key}.{images[0]}")
    shard.offsets.append(image.offset_data)
    shard.sizes.append(image.size)
    shard.labels.append(_text(archive, key, members, label_key))
    if owner_key is not None:
        shard.owners.append(_text(archive, key, members, owner_key))


def _text(archive: tarfile.TarFile, key: str, members: Members, wanted: str) -> str:
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
