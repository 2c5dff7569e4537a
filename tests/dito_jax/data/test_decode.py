"""Images of every usual kind: what is decoded is compared with pixels that are known, not with Pillow's conversion."""

import errno
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dito_jax.data import DataError, decode as module
from dito_jax.data.decode import UnreadableImage, decode, is_animated


RNG = np.random.default_rng(0)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content, channels=3, background="white", max_pixels=10_000, image_size=8):
    image = decode(
        "odd", lambda: io.BytesIO(content), channels=channels, image_size=image_size, background=background,
        max_pixels=max_pixels,
    )  # fmt: skip
    return np.asarray(image)


def random(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_plain_pixels_are_kept(kind):
    colour = random(9, 7, 3)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(colour), kind, **LOSSLESS[kind])), colour)
    grey = random(9, 7)
    if kind != "WEBP":
        np.testing.assert_array_equal(decoded(encoded(Image.fromarray(grey), kind), channels=1), grey)
        np.testing.assert_array_equal(decoded(encoded(Image.fromarray(grey), kind)), grey[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_are_decoded_as_pillow_does(kind):
    smooth = Image.fromarray(random(4, 4, 3)).resize((32, 32), Image.Resampling.BICUBIC)
    content = encoded(smooth, kind, quality=95)
    with Image.open(io.BytesIO(content)) as wanted:
        np.testing.assert_array_equal(decoded(content), np.asarray(wanted.convert("RGB")))
    assert np.abs(decoded(content).astype(int) - np.asarray(smooth)).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_to_eight(kind, channels):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    image = decoded(encoded(Image.fromarray(ramp), kind), channels)
    np.testing.assert_array_equal(image.reshape(16, 16, -1)[..., 0].ravel(), np.arange(256))


def test_sixteen_bits_with_white_as_zero_are_inverted():
    ramp = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
    content = encoded(Image.fromarray(ramp), "TIFF", tiffinfo={module.PHOTOMETRIC: module.WHITE_IS_ZERO})
    np.testing.assert_array_equal(decoded(content, 1).ravel(), np.arange(256)[::-1])


def test_a_transparent_value_of_sixteen_bits_is_background():
    values = np.array([[0, 257], [1000, 65535]], np.uint16)
    content = encoded(Image.fromarray(values), "PNG", transparency=1000)
    np.testing.assert_array_equal(decoded(content, 1, background="#808080"), [[0, 1], [128, 255]])


def test_pixels_of_32_bits_are_refused():
    for values in (np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)):
        with pytest.raises(UnreadableImage, match="32-bit pixels"):
            decoded(encoded(Image.fromarray(values), "TIFF"))


UPRIGHT = {  # from the stored pixels, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation):
    stored, exif = random(5, 9, 3), Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(stored), kind, exif=exif, **LOSSLESS[kind])
    np.testing.assert_array_equal(decoded(content), UPRIGHT[orientation](stored))


def test_exif_orientation_is_applied_to_a_jpeg():
    stored, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    stored[:8, :16], exif[0x0112] = 255, 6
    image = decoded(encoded(Image.fromarray(stored), "JPEG", exif=exif))
    assert image.shape == (32, 16, 3) and image[:16, 8:].mean() > 240 and image[16:].mean() < 15


@pytest.mark.parametrize(("background", "ground"), [("white", 255), ("black", 0), ("#808080", 128), ("#80808000", 128)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_is_composited_on_the_background(kind, background, ground):
    colour, alpha = random(8, 8, 3), random(8, 8)
    alpha[:4], alpha[4:6] = 0, 255
    content = encoded(Image.fromarray(np.dstack([colour, alpha])), kind)
    share = alpha[..., None] / 255
    wanted = colour * share + ground * (1 - share)
    np.testing.assert_allclose(decoded(content, background=background), wanted, atol=1)
    np.testing.assert_array_equal(decoded(content, background=background)[:4], ground)
    np.testing.assert_array_equal(decoded(content, background=background)[4:6], colour[4:6])


def test_transparency_of_grey_and_palette_images_is_composited():
    grey, alpha = random(8, 8), np.where(np.indices((8, 8))[0] < 4, 0, 255).astype(np.uint8)
    layers = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    np.testing.assert_array_equal(decoded(encoded(layers, "PNG"), 1), np.where(alpha, grey, 255))
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 255]])  # colour 0 is transparent
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(decoded(encoded(palette, kind, transparency=0)), colours[indices])


def test_opaque_alpha_changes_nothing():
    colour = random(8, 8, 3)
    opaque = Image.fromarray(np.dstack([colour, np.full((8, 8), 255, np.uint8)]))
    np.testing.assert_array_equal(decoded(encoded(opaque, "PNG")), colour)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("AVIF", {})])
def test_the_first_frame_of_an_animation_is_used(kind, options):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decoded(content).max() < 8 and is_animated(lambda: io.BytesIO(content))
    assert not is_animated(lambda: io.BytesIO(encoded(frames[0], kind)))


def test_two_colours_and_cmyk_are_read():
    bits = random(8, 8) > 127
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(bits), "PNG"), 1), np.where(bits, 255, 0))
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decoded(red)[8, 8], [255, 0, 0], atol=6)


def header_of_png(width, height):
    """A PNG whose header promises more than follows."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((101, 100), r"101 x 100 pixels, more than max_pixels 10,000"),
        ((5000, 1), r"5,000 x 1 pixels, which are 40,000 x 8 at image_size 8, more than max_pixels 10,000"),
        ((1, 5000), r"1 x 5,000 pixels, which are 8 x 40,000 at image_size 8"),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(size, words):
    for content in (header_of_png(*size), encoded(Image.new("L", size), "TIFF")):
        with pytest.raises(UnreadableImage, match=f"^odd: not a readable image .{words}"):
            decoded(content)
    assert decoded(encoded(Image.new("L", (100, 100)), "PNG")).shape == (100, 100, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_damaged_files_are_images_or_unreadable_and_nothing_else(kind):
    whole = encoded(Image.fromarray(random(16, 16, 3)), kind)
    for _ in range(60):
        content = bytearray(whole[: RNG.integers(1, len(whole) + 1)])
        for place in RNG.integers(0, len(content), RNG.integers(0, 4)):
            content[place] = RNG.integers(0, 256)
        try:
            image = decoded(bytes(content), max_pixels=100_000)
        except UnreadableImage as error:
            assert str(error).startswith("odd: not a readable image (") and "\n" not in str(error)
        else:
            assert image.dtype == np.uint8 and image.shape[2] == 3


def test_a_file_of_another_kind_is_no_image():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    for content in (b"", b"hello", postscript):
        with pytest.raises(UnreadableImage, match="its content is none of PNG, JPEG"):
            decoded(content)


@pytest.fixture
def naps(monkeypatch):
    naps = []
    monkeypatch.setattr(module.time, "sleep", naps.append)
    return naps


def read_with(errors):
    content = encoded(Image.new("L", (8, 8), 3), "PNG")

    def opened():
        if errors:
            raise OSError(errors[0], "what it is", errors.pop(0))
        return io.BytesIO(content)

    return decode("odd", opened, channels=1, image_size=8, background="white", max_pixels=100)


def test_a_passing_error_of_the_file_system_is_retried(naps):
    assert np.asarray(read_with([errno.EIO, errno.EMFILE])).tolist() == [[3] * 8] * 8
    assert naps == list(module.PAUSES[:2])
    with pytest.raises(DataError, match=r"^odd: cannot be read \(what it is\), in 4 attempts") as error:
        read_with([errno.EIO] * 4)
    assert not isinstance(error.value, UnreadableImage), "which would be skipped"


def test_a_missing_file_is_unreadable_at_once(naps):
    with pytest.raises(UnreadableImage, match="what it is"):
        read_with([errno.ENOENT] * 4)
    assert not naps
