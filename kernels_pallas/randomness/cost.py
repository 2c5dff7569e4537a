"""Work that no implementation avoids."""

from ..op import Cost


# Of a number: an eighth of ChaCha20's block (10 double rounds of 8 quarter rounds of 12, and 16 sums), the two shifts,
# the count of zeros and the index of its segment. On an H200 (132 processors of 64 a clock, 1.83 GHz) that is
# 1.1e11 numbers a second, 0.9 TB/s of reads and writes: less than memory's 4.8, so this bound is the one that counts.
INTEGER_OPERATIONS = (10 * 8 * 12 + 16) // 8 + 14


def secure_normal(x, key, nonce, start, *, stddev, whole) -> Cost:
    """The cubic's three products and sums, the scale and the sum: 8 a number. Reads x, writes the result."""
    del key, nonce, start, stddev, whole
    return Cost(8 * x.size, 2 * x.size * x.dtype.itemsize)
