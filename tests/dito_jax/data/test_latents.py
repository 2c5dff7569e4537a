import struct

import numpy as np
import pytest

from dito_jax.data import DataError, LatentsData, arrays, write_array_record


COUNT, SHAPE = 50, (4, 6, 2)
LATENTS = np.random.default_rng(0).standard_normal((COUNT, *SHAPE)).astype(np.float16)
LABELS = np.random.default_rng(1).integers(0, 1000, COUNT)


def npz(folder, name="all.npz", save=np.savez, **changed):
    save(folder / name, **{"latents": LATENTS, "labels": LABELS, **changed})
    return str(folder / name)


def compressed(folder):
    return npz(folder, save=np.savez_compressed)


def records(folder):
    write_array_record(folder / "a.arrayrecord", LATENTS[:30], LABELS[:30])
    write_array_record(folder / "b.arrayrecord", LATENTS[30:], LABELS[30:])
    return str(folder)


def record_glob(folder):
    return records(folder) + "/*.arrayrecord"


@pytest.mark.parametrize("make", [npz, compressed, records, record_glob])
def test_latents_come_back_scaled_and_every_twentieth_is_held_out(tmp_path, make):
    data = LatentsData(make(tmp_path), scaling_factor=0.5)
    validation = np.arange(COUNT) % 20 == 19
    for split, chosen in (("validation", validation), ("train", ~validation)):
        source = data.open(split)
        batch = arrays(source)
        assert source.image_shape == SHAPE
        np.testing.assert_array_equal(batch["image"], LATENTS[chosen].astype(np.float32) / 2)
        np.testing.assert_array_equal(batch["label"], LABELS[chosen])


def test_split_in_the_path_names_the_files_of_a_split(tmp_path):
    npz(tmp_path, "train.npz", latents=LATENTS[:3], labels=LABELS[:3])
    npz(tmp_path, "validation.npz", latents=LATENTS[3:5], labels=LABELS[3:5])
    data = LatentsData(f"{tmp_path}/{{split}}.npz")
    np.testing.assert_array_equal(arrays(data.open("train"))["label"], LABELS[:3])
    np.testing.assert_array_equal(arrays(data.open("validation"))["label"], LABELS[3:5])


def test_npz_is_not_read_until_asked_for(tmp_path):
    path = npz(tmp_path)
    source = LatentsData(path, scaling_factor=1.0).open("train")
    before = source[0]["image"]
    start = open_bytes(path).index(LATENTS[0].tobytes())
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(np.zeros(SHAPE, np.float16).tobytes())
    assert np.any(before) and not np.any(source[0]["image"])


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def missing(path):
    return path / "nothing.npz"


def no_archive(path):
    (path / "all.npz").write_bytes(b"hello" * 99)
    return path / "all.npz"


def cut_short(path):
    whole = open_bytes(npz(path))
    (path / "all.npz").write_bytes(whole[: len(whole) // 2])
    return path / "all.npz"


def without_labels(path):
    np.savez(path / "all.npz", latents=LATENTS)
    return path / "all.npz"


def too_few_labels(path):
    return npz(path, labels=LABELS[:-1])


def fractional_labels(path):
    return npz(path, labels=LABELS / 2)


def negative_label(path):
    return npz(path, labels=np.where(np.arange(COUNT) == 7, -1, LABELS))


def label_beyond_the_classes(path):
    return npz(path, labels=np.where(np.arange(COUNT) == 7, 1000, LABELS))


def flat_latents(path):
    return npz(path, latents=LATENTS.reshape(COUNT, -1))


def integer_latents(path):
    return npz(path, latents=np.ones((COUNT, *SHAPE), np.int8))


def no_examples(path):
    return npz(path, latents=LATENTS[:0], labels=LABELS[:0])


def no_records(path):
    return path


def no_record_file(path):
    (path / "a.arrayrecord").write_bytes(b"hello" * 99)
    return path / "a.arrayrecord"


BAD = [
    missing, no_archive, cut_short, without_labels, too_few_labels, fractional_labels, negative_label,
    label_beyond_the_classes, flat_latents, integer_latents, no_examples, no_records, no_record_file,
]  # fmt: skip


@pytest.mark.parametrize("make", BAD)
def test_unusable_latents_are_named_in_one_line_when_opened(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(DataError) as error:
        LatentsData(str(path)).open("train")
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value) and "; " in str(error.value)


def test_label_out_of_range_is_named_with_its_example(tmp_path):
    with pytest.raises(DataError, match="example 7 has label 1000, with num_classes=1000"):
        LatentsData(label_beyond_the_classes(tmp_path)).open("train")
    write_array_record(tmp_path / "a.arrayrecord", LATENTS, np.where(np.arange(COUNT) == 20, -1, LABELS))
    with pytest.raises(DataError, match="example 20 has label -1, with num_classes=1000"):
        arrays(LatentsData(str(tmp_path)).open("train"))


def test_record_of_another_shape_is_refused(tmp_path):
    write_array_record(tmp_path / "a.arrayrecord", LATENTS, LABELS)
    write_array_record(tmp_path / "b.arrayrecord", LATENTS[:, :2], LABELS)
    source = LatentsData(str(tmp_path)).open("train")
    with pytest.raises(DataError, match=f"record {COUNT} is not float16 of shape"):
        arrays(source)


def test_record_whose_bytes_changed_is_refused(tmp_path):
    path = tmp_path / "a.arrayrecord"
    noise = np.random.default_rng(0).standard_normal((COUNT, 32, 32, 4)).astype(np.float32)
    write_array_record(path, noise, LABELS)
    content = bytearray(path.read_bytes())
    content[100_000:100_064] = bytes(64)  # in the middle of a record
    path.write_bytes(content)
    with pytest.raises(DataError, match="record 6 cannot be read"):
        arrays(LatentsData(str(path)).open("train"))


def test_array_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.arrayrecord"
    with pytest.raises(struct.error):
        write_array_record(path, LATENTS, np.where(np.arange(COUNT) == 30, 2**40, LABELS))
    assert not path.exists()


@pytest.mark.parametrize("names", [[7, 3, 9], ["bob", "ann", "eve"]])
@pytest.mark.parametrize("make", [npz, records, record_glob])
def test_owners_are_stored_beside_the_latents(tmp_path, make, names):
    path = make(tmp_path)
    assert LatentsData(path).open("train").owners is None
    owners = np.array(names)[np.arange(COUNT) % 3]
    if make is npz:
        npz(tmp_path, owners=owners)
    else:
        np.save(tmp_path / "owners.npy", owners)
    source = LatentsData(path).open("train")
    assert source.owners is not None
    np.testing.assert_array_equal(source.owners, np.array([1, 0, 2])[np.arange(COUNT) % 3][np.arange(COUNT) % 20 != 19])


@pytest.mark.parametrize("owners", [np.arange(COUNT - 1), np.arange(COUNT) / 2, np.zeros((COUNT, 2), int)])
def test_owners_that_are_not_one_for_each_latent_are_one_line(tmp_path, owners):
    path = records(tmp_path)
    np.save(tmp_path / "owners.npy", owners)
    with pytest.raises(DataError, match="give one integer or name for each"):
        LatentsData(path).open("train")
    (tmp_path / "owners.npy").write_bytes(b"hello")
    with pytest.raises(DataError, match="owners.npy: owners are not readable"):
        LatentsData(path).open("train")
