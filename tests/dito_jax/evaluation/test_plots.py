import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dito_jax.evaluation.plots import GAP, SIDE, image_grid, loss_curve, roc_curves


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def tile(canvas, row, column, side):
    top, left = GAP + row * (side + GAP), GAP + column * (side + GAP)
    return canvas[top : top + side, left : left + side]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_each_image_in_its_place_with_square_pixels(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, channels))
    image_grid(images, tmp_path / "grid.png", columns=3)
    canvas = read(tmp_path / "grid.png").reshape(2 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP, channels)
    for number, image in enumerate(images):
        shown = tile(canvas, *divmod(number, 3), SIDE)
        wanted = np.rint((image + 1) * 127.5).repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)
        np.testing.assert_array_equal(shown, wanted)
    assert np.all(tile(canvas, 1, 2, SIDE) == 255)


def test_grid_clips_what_is_out_of_range_and_leaves_large_images_as_they_are(tmp_path):
    images = np.full((4, 100, 100, 3), 1.5)
    images[0] = -7
    image_grid(images, tmp_path / "grid.png")
    canvas = read(tmp_path / "grid.png")
    assert canvas.shape == (2 * (100 + GAP) + GAP, 2 * (100 + GAP) + GAP, 3)
    assert np.all(tile(canvas, 0, 0, 100) == 0) and np.all(tile(canvas, 0, 1, 100) == 255)


def test_grid_refuses_latents(tmp_path):
    with pytest.raises(ValueError, match="4 channels cannot be drawn; decode them"):
        image_grid(np.zeros((2, 8, 8, 4)), tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "samples" / "grid.png"
    image_grid(np.zeros((1, 8, 8, 1)), path)
    before = path.read_bytes()

    def full_disk(_, file, *args):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        image_grid(np.ones((1, 8, 8, 1)), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_loss_curve_falls_on_paper_where_the_loss_falls(tmp_path):
    steps = list(range(200))
    loss_curve(steps, [1 - step / 200 for step in steps], tmp_path / "loss.png")
    red, green, blue = np.moveaxis(read(tmp_path / "loss.png")[..., :3].astype(int), -1, 0)
    rows, columns = np.nonzero(blue - red > 50)  # the mean is drawn in matplotlib's blue
    left, right = columns < np.quantile(columns, 0.25), columns > np.quantile(columns, 0.75)
    assert np.median(rows[left]) < np.median(rows) < np.median(rows[right])


def test_loss_curve_takes_one_point_and_keeps_no_figure_open(tmp_path):
    loss_curve([0], [1.0], tmp_path / "loss.png")
    assert read(tmp_path / "loss.png").std() > 0
    assert plt.get_fignums() == []


def test_an_attack_that_knows_lies_above_one_that_does_not(tmp_path):
    rng = np.random.default_rng(0)
    scores = {"knows": (rng.normal(4, 1, 500), rng.normal(0, 1, 400)), "guesses": (rng.random(500), rng.random(400))}
    roc_curves(scores, tmp_path / "audit" / "roc.png")
    pixels = np.asarray(Image.open(tmp_path / "audit" / "roc.png").convert("RGB")).astype(int)
    blue, orange = (np.abs(pixels - color).sum(axis=2) < 60 for color in ((31, 119, 180), (255, 127, 14)))
    plot = slice(None), slice(0, pixels.shape[1] // 2)  # left half: low false positive rates, and no legend
    height = lambda mask: np.nonzero(mask[plot])[0].mean()
    assert height(blue) < height(orange) - 50  # rows count from above
