"""What the tests of image files in shards share: pixels as a PNG file and back, and a cache folder of their own."""

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the lists of shards and of copies of Parquet files."""
    monkeypatch.setenv("DITO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def png(pixels):
    """The bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def as_uint8(images):
    """Pixels of images in [-1, 1]."""
    return np.rint((images.astype(np.float64) + 1) * 127.5)
