"""Images in tar files in the layout of WebDataset: KEY.jpg with KEY.cls or KEY.json, read by random access.

Each shard is listed once (tar_index.py); then an example is one read at its offset. Compressed archives have no random
access and are refused.
"""

import dataclasses
import io
from array import array

import numpy as np

from dito_jax.data.images import ImageData, ImageSource, check_options
from dito_jax.data.labels import classes_of, numbered, owner_numbers
from dito_jax.data.names import Names
from dito_jax.data.shards import of_split, shards
from dito_jax.data.sources import DataError, Split
from dito_jax.data.tar_index import index as indexed


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
    cache_dir: str | None = None
    """Folder for the lists of what is in the tar files; default: $DITO_CACHE/data, or ~/.cache/dito_jax/data."""

    def open(self, split: Split) -> ImageSource:
        """The images of one split.

        Raises:
          DataError: the files are missing or damaged, or an image has no label.
        """
        check_options(self)
        if not self.label_key or self.owner_key == "":
            raise DataError("label_key, owner_key: wanted the extension of a member, such as cls or json.label.")
        files, own = shards(self.path, split, (".tar",))
        stored = _Stored(files, self)
        train = stored if split == "train" or not own else _Stored(shards(self.path, "train", (".tar",))[0], self)
        classes = classes_of(train.label_texts)
        labels = numbered(stored.label_texts, classes, self.path)[np.frombuffer(stored.labels, np.int32)]
        chosen = of_split(len(stored.names), split, own_files=own)
        if not len(chosen):
            raise DataError(f"{self.path}: no images in the {split} split.")
        owners = None if self.owner_key is None else owner_numbers(stored.owners)[chosen]
        left_out = stored.without_image
        notes = [f"{self.path}: left out {left_out:,} x sample without an image."] if left_out else []
        return ImageSource(self, split, _Members(stored, labels, chosen), classes, owners=owners, notes=notes)


class _Stored:
    """Where the images of some shards are, with the text of their labels; some 30 bytes for each image."""

    def __init__(self, files: list[str], config: WebDatasetData):
        self.files, self.names, self.file = files, Names(), array("i")
        self.offsets, self.sizes = array("q"), array("q")
        self.labels, self.label_texts, self.owners = array("i"), list[str](), list[str]()
        self.without_image = 0
        numbers: dict[str, int] = {}
        for number, file in enumerate(files):
            shard = indexed(file, config.label_key, config.owner_key, config.cache_dir)
            for name in shard.names:
                self.names.append(name)
            self.file.extend([number] * len(shard.names))
            self.offsets.extend(shard.offsets)
            self.sizes.extend(shard.sizes)
            self.labels.extend([numbers.setdefault(label, len(numbers)) for label in shard.labels])
            self.owners += shard.owners
            self.without_image += shard.without_image
        self.label_texts = list(numbers)


class _Members:
    """The images of a split."""

    def __init__(self, stored: _Stored, labels: np.ndarray, chosen: np.ndarray):
        self._stored, self._labels, self._chosen = stored, labels, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        number = int(self._chosen[index])
        return f"{self._stored.files[self._stored.file[number]]}: {self._stored.names[number]}"

    def opened(self, index: int) -> io.BytesIO:
        number, stored = int(self._chosen[index]), self._stored
        with open(stored.files[stored.file[number]], "rb", buffering=0) as file:
            file.seek(stored.offsets[number])
            return io.BytesIO(file.read(stored.sizes[number]))

    def label(self, index: int) -> int:
        return int(self._labels[self._chosen[index]])
