"""`dito data check`: a line for each unreadable example, and the exit code."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dito_jax.data import write_array_record


@pytest.fixture
def folder(tmp_path):
    """A class of four images to train with and two to validate with."""
    for split, count in (("train", 4), ("val", 2)):
        (tmp_path / "photos" / split / "ant").mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / split / "ant" / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_that_can_be_read_is_exit_code_zero(dito, folder):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "train" / "ant" / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "train" / "ant" / "notes.txt").write_text("")
    code, out, err = dito("data", "check", str(folder))
    assert code == 0 and out.splitlines() == [
        "train: 5 examples, 1 classes, 0 unreadable, 1 animated (the first frame is used)",
        "validation: 2 examples, 1 classes, 0 unreadable",
    ]
    assert err == f"{folder}/train: 5 images in 1 classes; left out 1 x .txt.\n"


def test_each_unreadable_image_is_listed_with_its_reason(dito, folder):
    (folder / "train" / "ant" / "1.png").write_bytes(b"")
    (folder / "train" / "ant" / "3.png").unlink()
    (folder / "train" / "ant" / "3.png").symlink_to("/nowhere")
    Image.new("RGB", (3000, 3000)).save(folder / "val" / "ant" / "0.png")
    for subject in ([str(folder)], ["images", "--data.path", str(folder), "--data.image_size", "8"]):
        code, out, err = dito("data", "check", *subject, "--data.max_pixels", "1000000", "--data.max_unreadable", "9")
        lines = out.splitlines()
        assert code == 2 and [line.partition(":")[0] for line in lines] == [
            f"{folder}/train/ant/1.png", f"{folder}/train/ant/3.png", "train", f"{folder}/val/ant/0.png", "validation"
        ]  # fmt: skip
        assert "none of PNG" in lines[0] and "No such file" in lines[1] and "3,000 x 3,000 pixels" in lines[3]
        assert err.startswith(f"dito: {subject[0]}: 3 unreadable; ") and len(err.splitlines()) == 1


def test_shards_and_latents_are_known_by_their_suffix(dito, tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_CACHE", str(tmp_path / "cache"))
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for name, data in {
            f"{n}.{kind}": data for n in range(40) for kind, data in (("png", content), ("cls", None))
        }.items():
            member = tarfile.TarInfo(name)
            data = b"0" if data is None else data.getvalue()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert dito("data", "check", str(tmp_path / "shards"))[1].startswith("train: 38 examples, 1 classes, 0 unreadable")
    (tmp_path / "latents").mkdir()
    labels = np.where(np.arange(40) == 5, 1000, 0)  # one is beyond the classes
    write_array_record(tmp_path / "latents" / "a.arrayrecord", np.zeros((40, 2, 2, 1), np.float32), labels)
    code, out, _ = dito("data", "check", str(tmp_path / "latents"))
    assert code == 2 and "example 5 has label 1000" in out and "train: 38 examples, 1,000 classes, 1 unreadable" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "no such file or folder of data"),
        (["imagse"], "Did you mean images"),
        (["digits", "--data.bogus", "1"], "no option --data.bogus"),
        ([], "subject|PATH"),
    ],
)
def test_a_mistake_is_one_line(dito, arguments, words):
    code, _, err = dito("data", "check", *arguments)
    assert code == 2 and len(err.splitlines()) == 1
    assert any(word in err for word in words.split("|"))
