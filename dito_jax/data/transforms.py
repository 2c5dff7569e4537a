"""What is done to one image between its file and the batch."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dito_jax.data.sources import Example


def centre_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "h w ..."]:
    """The middle square of an image, `size` pixels a side.

    Halves by box filter while both sides stay at least `size`, then scales the shorter side to `size` by
    bicubic interpolation, then cuts. Every published ImageNet figure of the DiT family rests on just these
    pixels (ADM, arXiv 2105.05233, in its code's `center_crop_arr`).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def random_flip(example: Example, rng: np.random.Generator) -> Example:
    """Mirrors the image left to right, every other time."""
    if rng.random() < 0.5:
        return Example(image=example["image"][:, ::-1], label=example["label"])
    return example
