"""A list of file names that takes little memory: one block of bytes for many millions of names."""

import os
from array import array


class Names:
    """Names in the order in which they were appended; some ten bytes each beside the characters."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q", [0])

    def append(self, name: str) -> None:
        """Adds a name; any name of a file is allowed, also one that is not UTF-8."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(bytes(self._bytes[self._ends[index] : self._ends[index + 1]]))
