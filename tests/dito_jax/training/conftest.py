"""What these tests share: a disk that is full, for one process and without root."""

import contextlib
import resource

import pytest


@pytest.fixture
def files_at_most():
    """`with files_at_most(1000):` no file of this process grows beyond 1000 bytes."""

    @contextlib.contextmanager
    def limit(num_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
