import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dito_jax.data import DataError, ImageFolderData, arrays
from dito_jax.data.transforms import centre_crop, random_flip


def write_images(folder: Path, count: int, seed: int = 0, size=(8, 8)) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return list(pixels)


def as_uint8(image):
    exact = (image.astype(np.float64) + 1) * 127.5
    np.testing.assert_allclose(exact, np.rint(exact), atol=255 * np.finfo(np.float32).eps)
    return np.rint(exact)


def test_classes_are_numbered_by_name_and_pixels_kept(tmp_path):
    zebra = write_images(tmp_path / "train" / "zebra", 2, seed=1)
    ant = write_images(tmp_path / "train" / "ant", 3, seed=2)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    source = ImageFolderData(str(tmp_path), 8).open("train")
    batch = arrays(source)
    assert source.num_classes == 2
    np.testing.assert_array_equal(batch["label"], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(as_uint8(batch["image"]), np.stack(ant + zebra))


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_format_is_read_in_grey_and_colour(tmp_path, suffix, channels, mode):
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"a.{suffix}")
    image = ImageFolderData(str(tmp_path), 8, channels).open("train")[0]["image"]
    with Image.open(folder / f"a.{suffix}") as stored:
        wanted = np.asarray(stored.convert(mode)).reshape(8, 8, channels)
    np.testing.assert_array_equal(as_uint8(image), wanted)


def test_validation_folder_shares_the_numbers_of_the_training_classes(tmp_path):
    write_images(tmp_path / "train" / "ant", 1)
    write_images(tmp_path / "train" / "bee", 1)
    bees = write_images(tmp_path / "validation" / "bee", 2, seed=3)
    source = ImageFolderData(str(tmp_path), 8).open("validation")
    batch = arrays(source)
    assert source.num_classes == 2
    np.testing.assert_array_equal(batch["label"], [1, 1])
    np.testing.assert_array_equal(as_uint8(batch["image"]), np.stack(bees))


@pytest.mark.parametrize("name", ["validation", "val", "test", "heldout"])
def test_validation_folder_has_any_of_the_usual_names(tmp_path, name):
    write_images(tmp_path / "train" / "ant", 3)
    write_images(tmp_path / name / "ant", 2, seed=1)
    splits = {split: ImageFolderData(str(tmp_path), 8).open(split) for split in ("train", "validation")}
    assert {split: len(source) for split, source in splits.items()} == {"train": 3, "validation": 2}


def test_split_without_folders_is_complete_and_never_changes_sides(tmp_path):
    def images(split):
        return {image.tobytes() for image in arrays(ImageFolderData(str(tmp_path), 8).open(split))["image"]}

    write_images(tmp_path / "ant", 60)
    train, validation = images("train"), images("validation")
    assert not train & validation and len(train | validation) == 60
    write_images(tmp_path / "ant" / "more", 60, seed=1)
    for path in (tmp_path / "ant" / "more").iterdir():
        path.rename(tmp_path / "ant" / f"a{path.name}")
    assert train < images("train") and validation <= images("validation")


def test_classes_whose_files_have_the_same_names_are_split_each_for_itself(tmp_path):
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 60, seed=1)
    held_out = arrays(ImageFolderData(str(tmp_path), 8).open("validation"))
    ants, bees = ({image.tobytes() for image in held_out["image"][held_out["label"] == label]} for label in (0, 1))
    assert ants and bees and ants != bees


def test_only_training_images_are_flipped(tmp_path):
    write_images(tmp_path / "train" / "ant", 1)
    write_images(tmp_path / "validation" / "ant", 1)
    data = ImageFolderData(str(tmp_path), 8, flip=True)
    assert data.open("train").augment is random_flip
    assert data.open("validation").augment is None
    assert ImageFolderData(str(tmp_path), 8).open("train").augment is None


def test_random_flip_mirrors_left_to_right_half_of_the_time():
    example = {"image": np.arange(24, dtype=np.float32).reshape(2, 4, 3), "label": np.int32(7)}
    rng = np.random.default_rng(0)
    draws = [random_flip(example, rng) for _ in range(400)]
    flipped = [np.array_equal(draw["image"], np.fliplr(example["image"])) for draw in draws]
    kept = [np.array_equal(draw["image"], example["image"]) for draw in draws]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert abs(sum(flipped) - 200) < 5 * 10  # a fair coin's standard deviation over 400 throws is 10
    assert all(draw["label"] == 7 for draw in draws)


def test_crop_keeps_the_middle_of_a_wide_and_of_a_tall_image():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 30, 3), np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), pixels[:, 7:23])
    tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(centre_crop(Image.fromarray(tall), 16), tall[7:23])


def test_crop_halves_by_averaging_before_it_interpolates():
    small = np.random.default_rng(0).integers(8, 248, (16, 16, 3), np.uint8)
    rows, columns = np.indices((64, 64))
    ripple = np.where((rows + columns) % 2, 8, -8)[:, :, None]  # averages to nothing over any 2x2 pixels
    blocks = (small.repeat(4, axis=0).repeat(4, axis=1) + ripple).astype(np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(blocks), 16), small)


def test_crop_scales_what_is_left_by_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    wanted = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(centre_crop(image, 16), wanted)


def no_folder(path):
    return path / "nothing", path / "nothing"


def a_file(path):
    (path / "file").write_text("")
    return path / "file", path / "file"


def no_classes(path):
    return path, path


def no_images(path):
    (path / "ant").mkdir()
    return path, path


def no_validation_folder(path):
    write_images(path / "train" / "ant", 1)
    return path, path / "validation"


def an_unknown_validation_class(path):
    write_images(path / "train" / "ant", 1)
    write_images(path / "validation" / "bee", 1)
    return path, path / "validation" / "bee"


@pytest.mark.parametrize(
    "make", [no_folder, a_file, no_classes, no_images, no_validation_folder, an_unknown_validation_class]
)
def test_unusable_folder_is_named_in_one_line(tmp_path, make):
    path, culprit = make(tmp_path)
    with pytest.raises(DataError) as error:
        ImageFolderData(str(path), 8).open("validation")
    assert str(error.value).startswith(f"{culprit}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"hello", lambda png: png[: len(png) // 2]])
def test_file_that_is_no_image_is_named_when_it_is_read(tmp_path, damage):
    write_images(tmp_path / "train" / "ant", 2)
    bad = tmp_path / "train" / "ant" / "001.png"
    bad.write_bytes(damage(bad.read_bytes()))
    source = ImageFolderData(str(tmp_path), 8).open("train")
    assert source[0]["image"].shape == (8, 8, 3)
    with pytest.raises(DataError) as error:
        source[1]
    assert str(error.value).startswith(f"{bad}: not a readable image") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_size": 0}, "image_size=0: wanted the side of an image"),
        ({"image_size": 8, "channels": 4}, r"channels=4: wanted 1 \(grey\) or 3 \(RGB\)"),
    ],
)
def test_size_that_no_image_has_is_refused(tmp_path, wrong, words):
    write_images(tmp_path / "train" / "ant", 1)
    with pytest.raises(DataError, match=words):
        ImageFolderData(str(tmp_path), **wrong).open("train")


def test_what_is_left_out_and_empty_classes_are_said(tmp_path):
    write_images(tmp_path / "train" / "ant", 3)
    write_images(tmp_path / "train" / "ant" / "more", 2)
    for name in ("notes.txt", "more.TXT", "README", ".DS_Store"):
        (tmp_path / "train" / "ant" / name).write_text("no image")
    (tmp_path / "train" / "zebra").mkdir()
    (tmp_path / "train" / "beside.png").write_text("")
    source = ImageFolderData(str(tmp_path), 8).open("train")
    assert source.classes == ["ant", "zebra"] and len(source) == 3
    assert source.notes == (
        f"{tmp_path / 'train'}: 3 images in 2 classes; left out 2 x .txt, 1 x file beside the class folders, 1 x file "
        "without a suffix, 1 x sub-folder (--data.nested True reads it).",
        f"{tmp_path / 'train'}: no training images in class zebra: remove such folders, or add images.",
    )
    for folder in ("more", "empty"):
        write_images(tmp_path / "plain" / "ant" / folder, 1)
    assert not ImageFolderData(str(tmp_path / "plain" / "ant"), 8).open("train").notes, "nothing to say"


def test_nested_folders_are_read_once_and_in_order(tmp_path):
    top = write_images(tmp_path / "train" / "ant", 1, seed=1)
    below = write_images(tmp_path / "train" / "ant" / "x" / "y", 2, seed=2)
    (tmp_path / "train" / "ant" / "x" / "loop").symlink_to(tmp_path / "train" / "ant")
    source = ImageFolderData(str(tmp_path), 8, nested=True).open("train")
    np.testing.assert_array_equal(as_uint8(arrays(source)["image"]), np.stack(top + below))
    assert source.name(2) == str(tmp_path / "train" / "ant" / "x/y/001.png") and not source.notes


def test_names_of_any_bytes_are_found(tmp_path):
    [pixels] = write_images(tmp_path / "train" / "ant", 1)
    odd = os.fsencode(tmp_path / "train" / "ant") + b"/\xff\n.PNG"
    os.rename(tmp_path / "train" / "ant" / "000.png", odd)
    source = ImageFolderData(str(tmp_path), 8).open("train")
    np.testing.assert_array_equal(as_uint8(source[0]["image"]), pixels)
    with open(odd, "wb"), pytest.raises(DataError, match=r"/\\udcff\\n.PNG: not a readable image") as error:
        source[0]
    assert "\n" not in str(error.value) and str(error.value).encode(), "a message that can be printed"


def test_owners_are_taken_from_folders_or_names(tmp_path):
    for folder in ("ant/ann", "ant/bob", "bee/bob"):
        write_images(tmp_path / "train" / folder, 2)
    source = ImageFolderData(str(tmp_path), 8, nested=True, owner_pattern="/(.+)/").open("train")
    assert source.owners is not None and source.owners.tolist() == [0, 0, 1, 1, 1, 1], "bob is one in both classes"
    by_name = ImageFolderData(str(tmp_path), 8, nested=True, owner_pattern=r"(\d)\.png$").open("train")
    assert by_name.owners is not None and by_name.owners.tolist() == [0, 1] * 3
    assert ImageFolderData(str(tmp_path), 8, nested=True).open("train").owners is None


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("/(.+)/", "does not match ant/000.png, so this image has no owner"),
        ("ant", "wanted one group in parentheses"),
        ("(", "not a regular expression"),
    ],
)
def test_an_image_without_an_owner_is_one_line(tmp_path, pattern, words):
    write_images(tmp_path / "train" / "ant", 1)
    with pytest.raises(DataError, match=words):
        ImageFolderData(str(tmp_path), 8, owner_pattern=pattern).open("train")


def broken(tmp_path, *numbers):
    pixels = write_images(tmp_path / "train" / "ant", 6)
    for number in numbers:
        (tmp_path / "train" / "ant" / f"{number:03d}.png").write_bytes(b"")
    return pixels


def test_unreadable_images_are_replaced_by_the_next_up_to_a_limit(tmp_path):
    pixels = broken(tmp_path, 1, 2, 5)
    source = ImageFolderData(str(tmp_path), 8, max_unreadable=3).open("train")
    wanted = np.stack([pixels[number] for number in (0, 3, 3, 3, 4, 0)])
    for _ in range(2):  # the same again, and no image counts twice
        np.testing.assert_array_equal(as_uint8(arrays(source)["image"]), wanted)
    assert sorted(source.unreadable) == [source.name(number) for number in (1, 2, 5)]
    source = ImageFolderData(str(tmp_path), 8, max_unreadable=2).open("train")
    source[1]
    with pytest.raises(DataError, match=r"005.png: not a readable image .* data.max_unreadable is 2"):
        source[5]


def test_a_folder_without_a_readable_image_is_one_line(tmp_path):
    broken(tmp_path, *range(6))
    with pytest.raises(DataError, match="no readable image"):
        ImageFolderData(str(tmp_path), 8, max_unreadable=100).open("train")[0]


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_out_of_range_is_an_index_error(tmp_path, index):
    broken(tmp_path)
    with pytest.raises(IndexError):
        ImageFolderData(str(tmp_path), 8).open("train")[index]


def test_a_start_takes_no_stat_of_each_file(tmp_path, monkeypatch):
    """Millions of files on a file system of a network are listed, and each is not asked for its size or kind."""
    write_images(tmp_path / "train" / "ant", 30)

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self.is_dir = entry.name, entry.path, entry.is_dir  # of the listing itself

    class Listing:
        def __init__(self, path):
            self.entries = list(scandir(path))

        def __enter__(self):
            return map(Entry, self.entries)

        def __exit__(self, *_):
            pass

    asked, scandir, stat = [], os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", Listing)
    monkeypatch.setattr(os, "stat", lambda path, **more: [asked.append(str(path)), stat(path, **more)][1])
    assert len(ImageFolderData(str(tmp_path), 8).open("train")) == 30
    assert not [path for path in asked if path.endswith(".png")]
