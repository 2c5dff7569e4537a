"""Images in [-1, 1] as pixels: uint8, grey or RGB; what is shown of latents; images reduced for comparisons."""

import numpy as np
from jaxtyping import Float, UInt8


REDUCED_SIDE = 32


def as_pixels(images: Float[np.ndarray, "B h w c"]) -> UInt8[np.ndarray, "B h w c"]:
    """Images in [-1, 1] as pixels from 0 to 255, rounded; values outside are clipped."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def as_rgb(images: UInt8[np.ndarray, "*B h w c"]) -> UInt8[np.ndarray, "*B h w 3"]:
    """Grey images with their channel three times; RGB images unchanged."""
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def visible(images: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B h w shown"]:
    """Images for a grid: grey or RGB unchanged; of latents the first three channels, or the first one."""
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., :3] if channels > 3 else images[..., :1]


def reduced(images: Float[np.ndarray, "B h w c"]) -> Float[np.ndarray, "B small_h small_w c"]:
    """The images with at most 32 x 32 pixels, each the mean of a rectangle of pixels; smaller images unchanged.

    A side of n pixels is cut into 32 parts of n / 32 pixels, rounded to whole pixels. The images are reduced one by
    one, so the memory beside them is that of one image.
    """
    if max(images.shape[1:3]) <= REDUCED_SIDE:
        return images
    return np.stack([_means(_means(image, 0), 1).astype(images.dtype) for image in images])


def _means(image: Float[np.ndarray, "h w c"], axis: int) -> Float[np.ndarray, "small_h small_w c"]:
    """The means over the parts of one side, in float64."""
    side = image.shape[axis]
    if side <= REDUCED_SIDE:
        return image
    edges = np.rint(np.linspace(0, side, REDUCED_SIDE + 1)).astype(int)
    sums = np.add.reduceat(image.astype(np.float64), edges[:-1], axis=axis)
    return sums / np.expand_dims(np.diff(edges), tuple({0, 1, 2} - {axis}))
