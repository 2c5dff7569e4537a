"""Fixed sine-cosine position embeddings of DiT; rotary embeddings are in `kernels_pallas.Rotation`."""

import numpy as np


def sincos_table(height: int, width: int, dim: int) -> np.ndarray:
    """DiT's position table, (T, D) float32: half of the channels encode the column, half the row, each [sin | cos]."""
    frequency = 1e4 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    parts = [f(np.outer(axis, frequency)) for axis in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
