"""Pixels: rounding, grey as RGB, images reduced by means of rectangles, and an evaluation in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from dito_jax.data import DigitsData, arrays
from dito_jax.evaluation.evaluate import evaluate
from dito_jax.evaluation.pixels import as_pixels, as_rgb, reduced


def test_pixels_are_rounded_and_clipped_and_grey_is_rgb_of_equal_channels():
    values = np.array([-2, -1, -1 + 0.9 / 127.5, 0.2, 1, 7], np.float32).reshape(1, 2, 3, 1)
    pixels = as_pixels(values)
    assert pixels.dtype == np.uint8 and pixels.ravel().tolist() == [0, 0, 1, 153, 255, 255]
    rgb = as_rgb(pixels)
    assert rgb.shape == (1, 2, 3, 3) and all(np.array_equal(rgb[..., c], pixels[..., 0]) for c in range(3))
    assert as_rgb(rgb) is rgb


def test_large_images_are_reduced_to_means_and_small_ones_stay():
    small = np.random.default_rng(0).standard_normal((2, 32, 8, 3)).astype(np.float32)
    assert reduced(small) is small
    large = np.random.default_rng(1).standard_normal((2, 64, 96, 3)).astype(np.float32)
    means = large.reshape(2, 32, 2, 32, 3, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(reduced(large), means, atol=1e-6)
    odd = np.arange(33, dtype=np.float32).reshape(1, 33, 1, 1)  # one rectangle of two pixels, 31 of one
    found = reduced(odd).ravel()
    assert len(found) == 32 and found[0] == 0 and found[-1] == 32 and np.isin(found % 1, (0, 0.5)).all()
    np.testing.assert_array_equal(np.diff(found) > 0, True)


class Enlarged:
    """The digits with each pixel repeated, so that the means of the rectangles are those pixels again."""

    num_classes, augment = 10, None

    def __init__(self, split: str, side: int, count: int):
        self._digits, self._factor, self._count = DigitsData().open(split), side // 8, count
        self.image_shape = (side, side, 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        example = self._digits[index]
        image = np.asarray(example["image"]).repeat(self._factor, axis=0).repeat(self._factor, axis=1)
        return {"image": image, "label": example["label"]}


def judged(side: int) -> tuple[dict, int]:
    """The figures of 30 samples at this size, and the peak of the memory."""
    train, validation = Enlarged("train", side, 60), Enlarged("validation", side, 30)
    samples = arrays(Enlarged("validation", side, 30))
    tracemalloc.start()
    figures = evaluate(samples["image"][::-1], samples["label"][::-1], train, validation, max_reference=55)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return figures, peak


def test_the_memory_of_an_evaluation_does_not_grow_with_the_images():
    small, few = judged(32)
    large, many = judged(256)
    assert small["image_shape_compared"] == large["image_shape_compared"] == [32, 32, 1]
    for name in ("class_agreement", "utility", "frechet_distance", "frechet_distance_of_train"):
        assert large[name] == pytest.approx(small[name], rel=1e-6), name
    assert large["frechet_distance"] == pytest.approx(0, abs=1e-6)
    of_all = 115 * 256 * 256 * 4  # bytes of all images in float32
    assert many < 0.5 * of_all and many < few + 0.2 * of_all, (few, many, of_all)
