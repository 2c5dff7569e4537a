"""Conversion between images and tokens: patchify and unpatchify."""

from jaxtyping import Array, Float


def patchify(image: Float[Array, "B h w c"], p: int) -> Float[Array, "B T patch"]:
    """Cuts p x p patches, row-major; inside a patch the order is (row, column, channel)."""
    b, h, w, c = image.shape
    patches = image.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: Float[Array, "B T patch"], p: int, height: int, width: int) -> Float[Array, "B h w c"]:
    """The inverse of `patchify` for an image of this size."""
    b = tokens.shape[0]
    grid = tokens.reshape(b, height // p, width // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(b, height, width, -1)
