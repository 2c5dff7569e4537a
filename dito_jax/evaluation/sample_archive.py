"""Writes samples to an .npz file batch by batch, in this project's form or in that of ADM's evaluator.

    this project   `images` float32 (N, h, w, c) in [-1, 1], or `latents`; `labels` int32 (N,)
    ADM            `arr_0` uint8 (N, h, w, 3), `arr_1` int32 (N,): the labels

The second form is what evaluation code for FID and Inception Score reads (guided-diffusion, arXiv 2105.05233). It is
written without compression, so that numpy can map it into memory.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from dito_jax.telemetry.run_directory import atomic_path


class NpzWriter:
    """An open .npz file with one array that grows; its first dimension is known beforehand."""

    def __init__(self, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self._member = archive.open(f"{name}.npy", "w", force_zip64=True)
        self._left, self._dtype = shape[0], dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._member, header)

    def append(self, rows: np.ndarray) -> None:
        """Writes the next rows of the array."""
        self._left -= len(rows)
        self._member.write(np.ascontiguousarray(rows, self._dtype).tobytes())

    def close(self) -> None:
        """Ends the array, which must be complete."""
        self._member.close()
        assert self._left == 0, f"{self._left} rows were not written"


@contextlib.contextmanager
def npz_of_samples(
    path: str | os.PathLike,
    names: tuple[str, str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    labels: Sequence[int],
) -> Iterator[NpzWriter]:
    """Yields a writer for the samples of `labels`, each of this shape; `names` are those of samples and labels.

    The file appears at the end, complete; after an error there is none.
    """
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        writer = NpzWriter(archive, names[0], (len(labels), *shape), dtype)
        try:
            yield writer
        except BaseException:
            writer._member.close()
            raise
        writer.close()
        with archive.open(f"{names[1]}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int32))
