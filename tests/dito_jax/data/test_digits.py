import numpy as np
from sklearn.datasets import load_digits

from dito_jax.data import DigitsData, arrays


def test_digits_splits_are_disjoint_and_complete():
    both = np.concatenate([DigitsData().open(split).images for split in ("train", "validation")])
    shipped = load_digits().images
    np.testing.assert_array_equal(
        np.sort([scan.tobytes() for scan in both]),
        np.sort([scan.astype(np.float32).tobytes() for scan in shipped[..., None] / 8 - 1]),
    )


def test_digits_hold_out_a_fifth_of_each_class():
    in_class = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(DigitsData().open("validation").labels), in_class // 5)


def test_digits_carry_their_own_label():
    shipped = load_digits()
    named = dict(zip((scan.tobytes() for scan in shipped.images), shipped.target, strict=True))
    for split in ("train", "validation"):
        batch = arrays(DigitsData().open(split))
        raw = (batch["image"][..., 0].astype(np.float64) + 1) * 8
        assert raw.min() == 0 and raw.max() == 16
        np.testing.assert_array_equal([named[scan.tobytes()] for scan in raw], batch["label"])
