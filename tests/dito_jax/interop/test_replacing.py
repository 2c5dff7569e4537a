"""A directory that is written as a whole: the old content or the new one, whatever happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dito_jax.errors import UserError
from dito_jax.interop import replacing
from dito_jax.interop.manifest import check_replaceable
from dito_jax.interop.replacing import replaced


ROOT = Path(__file__).parents[3]


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def write(directory: Path, content: str) -> None:
    with replaced(directory) as new:
        (new / "a").write_text(content)
        (new / "b").write_text(content)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_content_takes_the_place_of_the_old_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(replacing, "RENAME_EXCHANGE", 1 << 20)  # the kernel answers EINVAL
    directory = tmp_path / "deep" / "out"
    for content in ("old", "new"):
        write(directory, content)
        assert contents(directory) == {"a": content, "b": content}
    (tmp_path / "link").symlink_to(directory)
    write(tmp_path / "link", "newer")
    assert contents(directory)["a"] == "newer" and (tmp_path / "link").is_symlink()
    assert [path.name for path in directory.parent.iterdir()] == ["out"]


def test_an_error_leaves_the_old_content(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), replaced(tmp_path / "out") as new:
        (new / "a").write_text("new")
        raise RuntimeError
    assert contents(tmp_path / "out") == {"a": "old", "b": "old"} and len(list(tmp_path.iterdir())) == 1


KILLED = """
import os, sys
from pathlib import Path
from dito_jax.interop import replacing
from tests.dito_jax.interop.test_replacing import write
place = sys.argv[2]
def dies(owner, name):
    call = getattr(owner, name)
    def killed(*arguments, **options):
        os.kill(os.getpid(), 9)
    setattr(owner, name, killed)
dies(*{
    "written": (replacing, "sync_tree"), "synced": (replacing, "_exchange"),
    "exchanged": (replacing, "sync_directory"), "before the old one is deleted": (replacing.shutil, "rmtree"),
}[place])
write(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("place", ["written", "synced", "exchanged", "before the old one is deleted"])
def test_killed_anywhere_it_leaves_the_old_one_or_the_new_one(tmp_path, place):
    write(tmp_path / "out", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), place], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    wanted = "old" if place in ("written", "synced") else "new"
    assert contents(tmp_path / "out") == {"a": wanted, "b": wanted}
    assert len(list(tmp_path.iterdir())) == 2
    busy = tmp_path / f".out.{os.getppid()}.partial"
    busy.mkdir()
    write(tmp_path / "out", "newer")
    assert sorted(tmp_path.iterdir()) == [busy, tmp_path / "out"], "only what a dead process has left is removed"


def test_a_directory_with_files_of_the_user_is_not_replaced(tmp_path):
    check_replaceable(tmp_path / "none")
    for name in ("manifest.json", "function.bin", "host/cpu.mlirbc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_replaceable(tmp_path)
    for name in ("thesis.tex", "host/notes.md", "functionxbin"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"has {name}, which is no file of an artifact and would be deleted"):
            check_replaceable(tmp_path)
        (tmp_path / name).unlink()
