"""Cost model of secure noise: one read and one write of the array, and 8 flops per number."""

from ..op import Cost


# Per number: an eighth of a ChaCha20 block (10 double rounds of 8 quarter rounds of 12, and 16 sums), the two shifts,
# the count of leading zeros and the index of the segment. On an H200 (132 SMs, 64 per clock, 1.83 GHz) that is 1.1e11
# numbers/s, or 0.9 TB/s of reads and writes. That is less than the memory bandwidth of 4.8 TB/s: it is compute-bound.
INTEGER_OPERATIONS = (10 * 8 * 12 + 16) // 8 + 14


def secure_normal(x, key, nonce, start, *, stddev, whole) -> Cost:
    """The cubic's three products and sums, the scale and the sum: 8 flops per number. Reads x, writes the result."""
    del key, nonce, start, stddev, whole
    return Cost(8 * x.size, 2 * x.size * x.dtype.itemsize)
