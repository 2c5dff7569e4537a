"""Tar shards in the layout of WebDataset: the images and labels that were written, by random access."""

import io
import json
import tarfile

import numpy as np
import pytest

from dito_jax.data import DataError, WebDatasetData, arrays, tar_index

from .conftest import as_uint8, png


pytestmark = pytest.mark.usefixtures("cache")

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, 40)
NAMES = ("ant", "bee", "cat", "dog", "elk")


def write(path, samples, mode="w"):
    """A shard of samples {"name.extension": bytes}."""
    with tarfile.open(path, mode) as archive:
        for sample in samples:
            for name, content in sample.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def sample(number, folder="", **more):
    key = f"{folder}{number:06d}"
    return {f"{key}.png": png(IMAGES[number]), f"{key}.cls": b"%d\n" % LABELS[number]} | more


def test_examples_of_several_shards_come_back(tmp_path):
    write(tmp_path / "a-0.tar", [sample(number) for number in range(25)])
    write(tmp_path / "a-1.tar", [sample(number, "deep/er/") for number in range(25, 40)])
    for path in (tmp_path, tmp_path / "a-*.tar"):
        data = WebDatasetData(str(path), 8)
        validation = np.arange(40) % 20 == 19
        for split, chosen in (("validation", validation), ("train", ~validation)):
            batch = arrays(data.open(split))
            np.testing.assert_array_equal(as_uint8(batch["image"]), IMAGES[chosen])
            np.testing.assert_array_equal(batch["label"], LABELS[chosen])
        assert data.open("train").classes == ["0", "1", "2", "3", "4"]
    assert data.open("train").name(30) == f"{tmp_path}/a-1.tar: deep/er/000031.png"


@pytest.mark.parametrize("pattern", ["{split}-*.tar", ""])
def test_shards_of_a_split_hold_that_split(tmp_path, pattern):
    write(tmp_path / "train-0.tar", [sample(number) for number in range(30)])
    write(tmp_path / "val-0.tar", [sample(number) for number in range(30, 40) if LABELS[number] != LABELS.max()])
    data = WebDatasetData(f"{tmp_path}/{pattern}", 8)
    np.testing.assert_array_equal(arrays(data.open("train"))["label"], LABELS[:30])
    validation = data.open("validation")
    np.testing.assert_array_equal(
        arrays(validation)["label"], [label for label in LABELS[30:] if label != LABELS.max()]
    )
    assert validation.num_classes == 5, "as in training"


def test_labels_and_owners_of_a_json_member(tmp_path):
    def described(number):
        told = {"class": NAMES[LABELS[number]], "user": f"u{number % 7}"}
        return {f"{number}.json": json.dumps(told).encode(), f"{number}.png": png(IMAGES[number])}

    path = write(tmp_path / "train.tar", map(described, range(40)))
    source = WebDatasetData(path, 8, label_key="json.class", owner_key="json.user").open("train")
    chosen = np.arange(40) % 20 != 19
    assert source.classes == list(NAMES) and source.owners is not None
    np.testing.assert_array_equal(arrays(source)["label"], LABELS[chosen])
    np.testing.assert_array_equal(source.owners, (np.arange(40) % 7)[chosen])


def test_samples_without_an_image_are_said(tmp_path):
    path = write(tmp_path / "train.tar", [sample(0), {"7.txt": b"hello"}, sample(1)])
    source = WebDatasetData(path, 8).open("train")
    assert len(source) == 2 and source.notes == (f"{path}: left out 1 x sample without an image.",)


def test_a_shard_is_listed_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "train.tar", [sample(0)])
    opened = []
    monkeypatch.setattr(tar_index.tarfile, "open", lambda *given: [opened.append(given), tarfile.TarFile(given[0])][1])
    for _ in range(3):
        assert len(WebDatasetData(path, 8).open("train")) == 1
    assert len(opened) == 1
    WebDatasetData(path, 8, owner_key="cls").open("train")  # which the list does not have
    assert len(opened) == 2
    for list_of_shard in cache.iterdir():
        list_of_shard.write_text(list_of_shard.read_text()[:20])
    assert len(WebDatasetData(path, 8).open("train")) == 1 and len(opened) == 3, "a list that was cut off is not used"
    monkeypatch.undo()
    monkeypatch.setenv("DITO_CACHE", "/proc/nowhere")  # which cannot be written
    write(tmp_path / "train.tar", [sample(0), sample(1)])
    assert len(WebDatasetData(path, 8).open("train")) == 2
    monkeypatch.setenv("DITO_CACHE", str(cache.parent))
    assert len(WebDatasetData(path, 8).open("train")) == 2


def test_an_image_that_is_none_is_named_with_its_shard(tmp_path):
    path = write(tmp_path / "train.tar", [sample(0), {"1.png": b"hello", "1.cls": b"0"}])
    with pytest.raises(DataError, match=f"^{path}: 1.png: not a readable image"):
        WebDatasetData(path, 8).open("train")[1]


def cut_short(path):
    write(path, [sample(0), sample(1)])
    path.write_bytes(path.read_bytes()[:2600])


BAD = {
    "no label": (lambda path: write(path, [{"1.png": png(IMAGES[0])}]), "1 has no cls"),
    "two images": (lambda path: write(path, [sample(0, **{"000000.jpg": b""})]), "has several images"),
    "compressed": (lambda path: write(path, [sample(0)], "w:gz"), "give uncompressed .tar files"),
    "no archive": (lambda path: path.write_bytes(b"hello" * 999), "not a readable tar file"),
    "cut": (cut_short, "cut off within 000001.png"),
    "no samples": (lambda path: write(path, []), "no images in the train split"),
    "a negative class": (lambda path: write(path, [sample(0, **{"000000.cls": b"-1"})]), "label -1: wanted"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", BAD)
def test_a_shard_that_cannot_be_used_is_one_line(tmp_path, kind):
    make, words = BAD[kind]
    make(tmp_path / "train.tar")
    with pytest.raises(DataError, match=words) as error:
        WebDatasetData(str(tmp_path), 8).open("train")
    assert "\n" not in str(error.value)


def test_a_class_that_training_does_not_have_is_one_line(tmp_path):
    write(tmp_path / "train.tar", [sample(0, **{"000000.cls": b"ant"})])
    write(tmp_path / "test.tar", [sample(1, **{"000001.cls": b"bee"})])
    with pytest.raises(DataError, match="the training data have no class 'bee'"):
        WebDatasetData(str(tmp_path), 8).open("validation")


@pytest.mark.parametrize("path", ["", "/*.tar", "/{split}.tar", "/train.tar"])
def test_missing_shards_are_one_line(tmp_path, path):
    with pytest.raises(DataError, match="no .tar files"):
        WebDatasetData(f"{tmp_path}{path}", 8).open("train")
