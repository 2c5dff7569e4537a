"""Latents in ArrayRecord files: records read by number, for data that no memory holds.

A record is one example: the label as a little-endian int32, then the latent (h, w, c) as a `.npy` file. All
records of a data set have one shape and one dtype, so the header of the first is the header of all.
"""

import io
import os
import struct
from collections.abc import Sequence

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Integer

from dito_jax.data.sources import DataError


LABEL = struct.Struct("<i")


def write_array_record(
    path: str | os.PathLike, latents: Float[np.ndarray, "B h w c"], labels: Integer[np.ndarray, " B"]
) -> None:
    """Writes one file, whole or not at all; `latents` may be a memory map larger than the memory."""
    partial = f"{os.fspath(path)}.partial"
    writer = ArrayRecordWriter(partial, "group_size:1")  # a group is read as one: random access wants them single
    for latent, label in zip(latents, labels, strict=True):
        npy = io.BytesIO()
        np.save(npy, np.ascontiguousarray(latent))
        writer.write(LABEL.pack(label) + npy.getvalue())
    writer.close()
    os.replace(partial, path)


class ArrayRecords:
    """The records of some files, one file after the other."""

    def __init__(self, files: Sequence[str]):
        self._files = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}"
        try:
            self._records = ArrayRecordDataSource(files)
            first = self._records[0]
            npy = io.BytesIO(first[LABEL.size :])
            np.lib.format.read_magic(npy)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(npy)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise DataError(
                f"{self._files}: not readable as latents ({str(error).splitlines()[0]}); "
                "write them with dito_jax.data.write_array_record."
            ) from error
        self._start = LABEL.size + npy.tell()
        self._header = first[LABEL.size : self._start]

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[Float[np.ndarray, "h w c"], int]:
        """One latent and its label.

        Raises:
          DataError: the record cannot be read, or is of another shape or dtype than the first.
        """
        try:
            record = self._records[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self._files}: record {index} cannot be read; write the files again.") from error
        if record[LABEL.size : self._start] != self._header:
            raise DataError(
                f"{self._files}: record {index} is not {self.dtype} of shape {self.shape}, as the first is; "
                "keep each dtype and shape in files of its own."
            )
        latent = np.frombuffer(record, self.dtype, offset=self._start).reshape(self.shape)
        return latent, LABEL.unpack_from(record)[0]
