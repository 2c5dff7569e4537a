"""Image transforms: center crop and random horizontal flip."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dito_jax.data.sources import Example


def centre_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "h w ..."]:
    """Resizes and center-crops an image to `size` x `size` pixels.

    Halves the image with a box filter while both sides stay at least `size`, then scales the shorter side to `size` by
    bicubic interpolation, then crops. This is `center_crop_arr` of ADM's code (arXiv 2105.05233), which all published
    ImageNet results of the DiT family use.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def random_flip(example: Example, rng: np.random.Generator) -> Example:
    """Mirrors the image left to right with probability 1/2."""
    if rng.random() < 0.5:
        return Example(image=example["image"][:, ::-1], label=example["label"])
    return example
