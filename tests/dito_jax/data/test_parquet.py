"""Parquet and Arrow files in the layout of Hugging Face data sets: what was written comes back by row number."""

import json

import numpy as np
import pytest

from dito_jax.data import DataError, ParquetData, arrays

from .conftest import as_uint8, png


pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("cache")

IMAGES = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, 45)
NAMES = ["cat", "ant", "bee"]  # in the order of a ClassLabel, which is not alphabetical


def table(rows=range(45), label=None, names=None, **columns):
    images = pa.array([{"bytes": png(IMAGES[row]), "path": f"{row}.png"} for row in rows])
    labels = pa.array([int(LABELS[row]) if label is None else label[LABELS[row]] for row in rows])
    made = pa.table({"note": pa.array(["x"] * len(rows)), "image": images, "label": labels, **columns})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"} if names else {}}
    told = json.dumps({"info": {"features": features}})
    return made.replace_schema_metadata({"huggingface": told})


def test_rows_of_several_files_and_row_groups_come_back(tmp_path):
    parquet.write_table(table(range(28)), tmp_path / "a.parquet", row_group_size=7)
    parquet.write_table(table(range(28, 45)), tmp_path / "b.parquet", row_group_size=4)
    data = ParquetData(str(tmp_path), 8)
    validation = np.arange(45) % 20 == 19
    for split, chosen in (("validation", validation), ("train", ~validation)):
        batch = arrays(data.open(split))
        np.testing.assert_array_equal(as_uint8(batch["image"]), IMAGES[chosen])
        np.testing.assert_array_equal(batch["label"], LABELS[chosen])
    assert data.open("train").classes == ["0", "1", "2"]


def test_names_of_a_class_label_feature_are_the_classes(tmp_path):
    parquet.write_table(table(range(40), names=NAMES), tmp_path / "train-00000-of-00001.parquet")
    parquet.write_table(table(range(40, 45), names=NAMES), tmp_path / "test-00000-of-00001.parquet")
    data = ParquetData(str(tmp_path), 8)
    assert data.open("train").classes == NAMES
    np.testing.assert_array_equal(arrays(data.open("validation"))["label"], LABELS[40:])


def test_a_column_of_names_is_numbered_by_name(tmp_path):
    parquet.write_table(table(label=NAMES), tmp_path / "a.parquet")
    source = ParquetData(str(tmp_path), 8).open("train")
    assert source.classes == sorted(NAMES)
    wanted = [sorted(NAMES).index(NAMES[label]) for label in LABELS[np.arange(45) % 20 != 19]]
    np.testing.assert_array_equal(arrays(source)["label"], wanted)


def test_owners_are_a_column(tmp_path):
    parquet.write_table(table(user=pa.array([f"u{row % 4}" for row in range(45)])), tmp_path / "a.parquet")
    source = ParquetData(str(tmp_path), 8, owner_column="user").open("train")
    assert source.owners is not None
    np.testing.assert_array_equal(source.owners, (np.arange(45) % 4)[np.arange(45) % 20 != 19])


def test_images_may_be_plain_bytes_or_files_beside(tmp_path):
    plain = pa.table({"image": pa.array([png(image) for image in IMAGES[:5]]), "label": pa.array(LABELS[:5])})
    parquet.write_table(plain, tmp_path / "train.parquet")
    np.testing.assert_array_equal(as_uint8(arrays(ParquetData(str(tmp_path), 8).open("train"))["image"]), IMAGES[:5])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "7.png").write_bytes(png(IMAGES[7]))
    images = pa.array([{"bytes": None, "path": "7.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    parquet.write_table(pa.table({"image": images, "label": pa.array([1])}), tmp_path / "files" / "train.parquet")
    [image] = arrays(ParquetData(str(tmp_path / "files"), 8).open("train"))["image"]
    np.testing.assert_array_equal(as_uint8(image), IMAGES[7])


@pytest.mark.parametrize("new", ["new_file", "new_stream"])
def test_arrow_files_are_read_in_place(tmp_path, cache, new):
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, getattr(pa.ipc, new)(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=6)
    batch = arrays(ParquetData(str(tmp_path), 8).open("train"))
    np.testing.assert_array_equal(as_uint8(batch["image"]), IMAGES[np.arange(45) % 20 != 19])
    assert not cache.exists()


def test_a_parquet_file_is_copied_once_and_again_when_it_changes(tmp_path, cache):
    path = tmp_path / "train.parquet"
    parquet.write_table(table(range(9)), path)
    for _ in range(2):
        assert len(ParquetData(str(path), 8).open("train")) == 9
    [copy] = cache.iterdir()
    written = copy.stat().st_mtime_ns
    assert len(ParquetData(str(path), 8).open("train")) == 9 and copy.stat().st_mtime_ns == written
    parquet.write_table(table(range(12)), path)
    assert len(ParquetData(str(path), 8).open("train")) == 12
    elsewhere = ParquetData(str(path), 8, cache_dir=str(tmp_path / "mine"))
    assert len(elsewhere.open("train")) == 12 and (tmp_path / "mine").is_dir()


def test_an_empty_row_is_an_unreadable_image(tmp_path):
    images = pa.array([{"bytes": png(IMAGES[0]), "path": None}, None])
    parquet.write_table(pa.table({"image": images, "label": pa.array([0, 1])}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet: row 1: not a readable image \(the column image is empty\)"):
        ParquetData(str(tmp_path), 8).open("train")[1]
    assert len(arrays(ParquetData(str(tmp_path), 8, max_unreadable=1).open("train"))["image"]) == 2


def written(**changed):
    return lambda path: parquet.write_table(table(range(3)).set_column(1, *changed["image"]), path)


BAD = {
    "no file": (lambda path: path.write_bytes(b"hello" * 99), {}, "not readable as Parquet or Arrow"),
    "no label": (lambda path: parquet.write_table(table(range(3)), path), {"label_column": "y"}, "no column 'y'"),
    "no owner": (lambda path: parquet.write_table(table(range(3)), path), {"owner_column": "u"}, "no column 'u'"),
    "arrays": (written(image=("image", pa.array([[1], [2], [3]]))), {}, "wanted encoded images"),
    "fractions": (
        lambda path: parquet.write_table(table(range(3)).set_column(2, "label", pa.array([0.5, 1, 2])), path),
        {}, "wanted integers or names",
    ),
    "nothing": (
        lambda path: parquet.write_table(table(range(3)).set_column(2, "label", pa.array([0, None, 2])), path),
        {}, "is empty in 1 rows",
    ),
    "no rows": (lambda path: parquet.write_table(table(range(3)).slice(0, 0), path), {}, "no images in the train"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, kind):
    make, options, words = BAD[kind]
    make(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=words) as error:
        ParquetData(str(tmp_path), 8, **options).open("train")
    assert "\n" not in str(error.value)
