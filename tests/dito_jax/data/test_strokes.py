"""Stroke digits: a function of seed and index, with ten distinguishable classes, and not copied from scans."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dito_jax.data import DigitsData, StrokesData
from dito_jax.errors import UserError


SMALL = StrokesData(num=60)


def test_a_picture_is_a_function_of_seed_split_and_number():
    first, longer = SMALL.open("train"), dataclasses.replace(SMALL, num=80).open("train")
    assert len(first) == 60 and len(longer) == 80 and len(SMALL.open("validation")) == 12
    np.testing.assert_array_equal(first.images, longer.images[:60])
    np.testing.assert_array_equal(first[7]["image"], first.images[7])
    for other in (
        dataclasses.replace(SMALL, seed=1).open("train"),
        dataclasses.replace(SMALL, num=300).open("validation"),
    ):
        assert all((one != another).any() for one, another in zip(first.images, other.images, strict=True))


def test_pictures_are_grey_in_range_and_of_all_classes():
    source = dataclasses.replace(SMALL, size=12).open("train")
    assert source.image_shape == (12, 12, 1) and source.images.dtype == np.float32
    assert source.images.min() == -1 and source.images.max() == 1 and len(np.unique(source.images)) > 8
    assert np.bincount(source.labels).tolist() == [6] * 10
    ink = (source.images > 0).mean(axis=(1, 2, 3))
    assert ink.min() > 0.03 and ink.max() < 0.6


def test_classes_can_be_told_apart_also_those_of_scans():
    rows = lambda source: source.images.reshape(len(source), -1)
    train, validation, scans = (
        StrokesData(num=1000).open("train"),
        SMALL.open("validation"),
        DigitsData().open("validation"),
    )
    classifier = LogisticRegression(max_iter=1000).fit(rows(train), train.labels)
    assert classifier.score(rows(validation), validation.labels) > 0.9
    assert 0.4 < classifier.score(rows(scans), scans.labels) < 0.9  # digits they are, and other ones


@pytest.mark.parametrize("changes", [{"num": 9}, {"size": 3}])
def test_what_cannot_be_drawn_is_said(changes):
    with pytest.raises(UserError, match="wanted at least 10 images of 4 x 4 pixels"):
        dataclasses.replace(SMALL, **changes).open("train")
