"""Cost model of the checksum: one read of the array."""

from ..op import Cost


# Per 32-bit word: seven products, eight shifts and eight exclusive ors, and six sums, on two pipes. On an H200
# (132 SMs, 64 per clock on each pipe, 1.83 GHz) the longer pipe takes 18: 8.6e11 words/s, 3.4 TB/s.
INTEGER_OPERATIONS = 29


def state_digest(x, start, *, whole) -> Cost:
    """One read of x."""
    del start, whole
    return Cost(0, x.size * x.dtype.itemsize)
