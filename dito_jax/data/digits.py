"""The handwritten digits of scikit-learn: 1,797 scans of 8x8 pixels in ten classes; no download."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer

from dito_jax.data.sources import Example, Split


NUM_CLASSES = 10
VALIDATION_ONE_IN = 5  # one scan in five is held out for validation


@dataclasses.dataclass(frozen=True)
class DigitsData:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels in ten classes; no options."""

    def open(self, split: Split) -> "Digits":
        """The scans of one split."""
        return Digits(split)


class Digits:
    """One split of the digits, held in memory."""

    image_shape = (8, 8, 1)
    num_classes = NUM_CLASSES
    augment = None  # a mirrored digit is not a digit

    def __init__(self, split: Split):
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        pixels, labels = load_digits(return_X_y=True)  # pixels are 0 to 16: the number of ink dots in a 4x4 cell
        chosen = _validation(labels) == (split == "validation")
        images = pixels[chosen].reshape(-1, *self.image_shape)
        self.images: Float32[np.ndarray, "B 8 8 1"] = (images / 8 - 1).astype(np.float32)
        self.labels: Int32[np.ndarray, " B"] = labels[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.images[index], label=self.labels[index])


def _validation(labels: Integer[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
    """Mask of the validation split: every fifth scan of each class, in file order (stratified, not random)."""
    rank = np.empty_like(labels)
    for label in range(NUM_CLASSES):
        of_class = labels == label
        rank[of_class] = np.arange(of_class.sum())
    return rank % VALIDATION_ONE_IN == VALIDATION_ONE_IN - 1
