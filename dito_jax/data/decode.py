"""Decodes image files of any usual kind to 8-bit grey or RGB: 16-bit, transparent, rotated, palette, CMYK, animated."""

import errno
import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from dito_jax.data.sources import DataError, printable


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MODES = {1: "L", 3: "RGB"}  # Pillow's mode by the number of channels
PAUSES = (0.1, 1.0, 4.0)  # seconds before the second, third and fourth attempt to read
# Errors of the operating system that the file itself causes; after any other the read is repeated.
OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
Opened = str | io.BytesIO  # a path, or the encoded bytes


class UnreadableImage(DataError):
    """One image of a data set cannot be decoded; the others may be fine."""

    def __init__(self, name: str, reason: str):
        name = printable(name)
        super().__init__(f"{name}: not a readable image ({reason}); repair it or remove it.")
        self.name, self.reason = name, reason


def decode(
    name: str, opened: Callable[[], Opened], *, channels: int, image_size: int, background: str, max_pixels: int
) -> Image.Image:
    """The first frame of an image, upright, as 8-bit grey (1 channel) or RGB (3 channels).

    16-bit grey is scaled to 8 bits, transparent pixels are composited on `background`, and EXIF orientation is applied.
    An 8-bit image without these is Pillow's `convert`.

    Args:
      name: names the image in errors.
      opened: returns a path or a file object; called again for each attempt.
      image_size: side of the square that the image will be resized to.
      max_pixels: limit on width x height, read from the header before the pixels are decoded, and on the same
        after the shorter side is enlarged to image_size.

    Raises:
      UnreadableImage: the file is missing, damaged, too large, or of an unknown format.
      DataError: the file system failed in each of four attempts.
    """
    for pause in (*PAUSES, None):
        try:
            return _decoded(opened(), MODES[channels], background, image_size=image_size, max_pixels=max_pixels)
        except UnreadableImage:
            raise
        except (OSError, ValueError) as error:
            code = error.errno if isinstance(error, OSError) else None
            if code is None or code in OF_THE_FILE:
                raise UnreadableImage(name, _reason(error)) from error
            if pause is None:
                raise DataError(
                    f"{printable(name)}: cannot be read ({_reason(error)}), in {len(PAUSES) + 1} attempts; check the "
                    "file system and the limits of this process, then run the same command again."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def is_animated(opened: Callable[[], Opened]) -> bool:
    """Whether a readable image has several frames, of which only the first is used."""
    with Image.open(opened(), formats=FORMATS) as image:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # the MPO of a phone is a still


def _decoded(file: Opened, mode: str, background: str, *, image_size: int, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_pixels(image.size, image_size, max_pixels)
            return _flattened(image, mode, background)
    except OSError:
        raise
    except Exception as error:  # Pillow raises exceptions of many kinds for damaged files
        raise ValueError(_reason(error)) from error


def _check_pixels(size: tuple[int, int], image_size: int, max_pixels: int) -> None:
    width, height = size
    scale = max(1.0, image_size / max(min(size), 1))
    if width * height > max_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels, more than max_pixels {max_pixels:,}")
    if width * height * scale**2 > max_pixels:
        raise ValueError(
            f"{width:,} x {height:,} pixels, which are {width * scale:,.0f} x {height * scale:,.0f} at image_size "
            f"{image_size}, more than max_pixels {max_pixels:,}"
        )


def _flattened(image: Image.Image, mode: str, background: str) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed white; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image scaled to 8 bits, with an alpha channel if one of its values stands for transparency."""
    tags = getattr(image, "tag_v2", {})
    most = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8-bit images of this kind, but not 16-bit ones
        grey = 255 - grey
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))


def _reason(error: Exception) -> str:
    """The reason of an error in one line, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
