"""Latents in ArrayRecord files, with random access, for data sets that do not fit in memory.

A record is one example: the label as a little-endian int32, then the latent (h, w, c) in `.npy` format. All records of
a data set have the same shape and dtype, so they all have the same `.npy` header.
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
    """Writes one ArrayRecord file atomically; `latents` may be a memory map that is larger than the memory."""
    partial = f"{os.fspath(path)}.partial"
    writer = ArrayRecordWriter(partial, "group_size:1")  # one record per group, because a group is read as a whole
    for latent, label in zip(latents, labels, strict=True):
        npy = io.BytesIO()
        np.save(npy, np.ascontiguousarray(latent))
        writer.write(LABEL.pack(label) + npy.getvalue())
    writer.close()
    os.replace(partial, path)


class ArrayRecords:
    """The records of several files, one file after the other."""

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
          DataError: the record cannot be read, or its shape or dtype differs from the first record's.
        """
        try:
            record = self._records[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self._files}: record {index} cannot be read; write the files again.") from error
        if record[LABEL.size : self._start] != self._header:
            raise DataError(
                f"{self._files}: record {index} is not {self.dtype} of shape {self.shape} like the first record; "
                "write separate files for each dtype and shape."
            )
        latent = np.frombuffer(record, self.dtype, offset=self._start).reshape(self.shape)
        return latent, LABEL.unpack_from(record)[0]
