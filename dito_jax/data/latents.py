"""Latents: images encoded beforehand by an autoencoder (VAE), in one .npz file or in ArrayRecord files."""

import dataclasses
import glob
import os
import struct
import zipfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from dito_jax.data.array_record import ArrayRecords
from dito_jax.data.labels import owner_numbers
from dito_jax.data.shards import of_split
from dito_jax.data.sources import SPLIT_NAMES, VALIDATION_ONE_IN, DataError, Example, Split


OWNERS = "owners.npy"


@dataclasses.dataclass(frozen=True)
class LatentsData:
    """Images encoded by an autoencoder (VAE) beforehand, as latents.

    `path` is one .npz with `latents` (N, h, w, c) and `labels` (N,), a folder of .arrayrecord files, or a glob of them.
    "{split}" in it is replaced by train, and by validation, val or test, whichever exists: "latents/{split}.npz".
    Without "{split}" the examples numbered 19, 39, 59, ... are the validation split.
    `owners` (N,) in the .npz, or owners.npy beside the .arrayrecord files, has the owner of each example, an integer or
    a name, for privacy.images_per_user.
    """

    path: str
    """An .npz file, a folder of .arrayrecord files, or a glob; {split} stands for train or validation."""
    scaling_factor: float = 0.18215
    """Factor on the latents; 0.18215 is that of Stable Diffusion's VAE (arXiv 2112.10752), for unit variance."""
    num_classes: int = 1000
    """Number of classes, numbered from 0."""

    def open(self, split: Split) -> "Latents":
        """The latents of one split.

        Raises:
          DataError: the files are missing, or have the wrong arrays, shapes, dtypes or labels.
        """
        return Latents(self, split)

    def unscaled(self, latents: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B h w c"]:
        """Latents of the model, such as samples, as the autoencoder's decoder takes them: without the factor."""
        return latents / np.float32(self.scaling_factor)


class Latents:
    """One split of the latents; `image` of an example is scaling_factor * latent."""

    augment = None  # a mirrored latent is not the latent of the mirrored image
    owners: Int[np.ndarray, " n"] | None = None  # the owner of each example, for user-level privacy

    def __init__(self, config: LatentsData, split: Split):
        names = [os.path.expanduser(config.path.replace("{split}", name)) for name in SPLIT_NAMES[split]]
        path = next((name for name in names if os.path.exists(name) or glob.glob(name)), names[0])
        self._path, self._scale = path, np.float32(config.scaling_factor)
        self.num_classes = config.num_classes
        if path.endswith(".npz"):
            self._stored = Npz(path)
            for number in np.flatnonzero((self._stored.labels < 0) | (self._stored.labels >= self.num_classes)):
                raise self._out_of_range(int(number), int(self._stored.labels[number]))
        else:
            self._stored = ArrayRecords(_array_record_files(path))
        owners = _owners(path, len(self._stored))
        if len(self._stored.shape) != 3 or self._stored.dtype.kind != "f":
            raise DataError(
                f"{path}: latents are {self._stored.dtype} of shape {self._stored.shape} each; "
                "wanted floating point (h, w, c)."
            )
        self.image_shape = self._stored.shape
        self._numbers = of_split(len(self._stored), split, own_files="{split}" in config.path)
        self.owners = None if owners is None else owners[self._numbers]
        if not len(self._numbers):
            raise DataError(f"{path}: no examples in the {split} split; wanted at least {VALIDATION_ONE_IN} examples.")

    def __len__(self) -> int:
        return len(self._numbers)

    def contents(self) -> Iterator[bytes]:
        """Shape and numbers of the latents, and the labels of an .npz file, for the fingerprint of the data set."""
        yield repr((self.image_shape, str(self._stored.dtype), len(self._stored))).encode()
        if isinstance(self._stored, Npz):
            yield self._stored.labels.tobytes()

    def __getitem__(self, index: int) -> Example:
        """Reads one example; raises DataError if it cannot be read or its label is out of range."""
        number = int(self._numbers[index])
        latent, label = self._stored.read(number)
        if not 0 <= label < self.num_classes:
            raise self._out_of_range(number, label)
        return Example(image=latent.astype(np.float32) * self._scale, label=np.int32(label))

    def _out_of_range(self, number: int, label: int) -> DataError:
        return DataError(
            f"{self._path}: example {number} has label {label}, with num_classes={self.num_classes}; "
            f"give labels from 0 to num_classes - 1."
        )


class Npz:
    """`latents` and `labels` of an .npz file; an uncompressed file (np.savez) is memory-mapped."""

    def __init__(self, path: str):
        try:
            latents, self.labels = (_array(path, key) for key in ("latents", "labels"))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error.args[0]
            raise DataError(f"{path}: {reason}; give an .npz that holds `latents` and `labels`.") from error
        if self.labels.dtype.kind not in "iu" or self.labels.shape != latents.shape[:1]:
            raise DataError(
                f"{path}: labels are {self.labels.dtype} of shape {self.labels.shape} for latents of shape "
                f"{latents.shape}; give one integer for each latent."
            )
        self._latents, self.shape, self.dtype = latents, latents.shape[1:], latents.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Float[np.ndarray, "h w c"], int]:
        """One latent and its label."""
        return self._latents[index], int(self.labels[index])


def _owners(path: str, count: int) -> Int[np.ndarray, " N"] | None:
    """The number of the owner of each example, if the data set has owners.

    Raises:
      DataError: there is not one integer or name for each example.
    """
    file = (
        path if path.endswith(".npz") else os.path.join(path if os.path.isdir(path) else os.path.dirname(path), OWNERS)
    )
    if not os.path.exists(file):
        return None
    try:
        with open(file, "rb") as opened:
            stored = np.load(opened)
            if path.endswith(".npz") and "owners" not in stored:
                return None
            owners = stored["owners"] if path.endswith(".npz") else stored
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: owners are not readable ({error}); save them with np.save.") from error
    if owners.dtype.kind not in "iuU" or owners.shape != (count,):
        raise DataError(
            f"{file}: owners are {owners.dtype} of shape {owners.shape} for {count:,} latents; give one integer or "
            "name for each."
        )
    return owner_numbers(owners)


def _array(path: str, key: str) -> np.ndarray:
    """One array of an .npz: memory-mapped, or read into memory if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        with np.load(path) as arrays:
            return arrays[key]
    with open(path, "rb") as file:
        # The local zip header ends with the lengths of the two fields between the header and the data.
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def _array_record_files(path: str) -> list[str]:
    pattern = os.path.join(glob.escape(path), "*.arrayrecord") if os.path.isdir(path) else path
    if not (files := sorted(glob.glob(pattern))):
        raise DataError(f"{path}: no .arrayrecord files; give an .npz file, a folder of .arrayrecord files, or a glob.")
    return files
