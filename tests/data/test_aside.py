import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.aside import new_folder
from pipeline.errors import UserError


def fill(destination: Path, meanwhile: Callable[[Path], object] = lambda folder: None) -> None:
    with new_folder(destination) as folder:
        (folder / "a.tar").write_text("a")
        (folder / "dataset.json").write_text("{}")
        meanwhile(folder)


def fail(error: Exception) -> Callable[[Path], None]:
    def meanwhile(folder: Path) -> None:
        raise error

    return meanwhile


def left(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def test_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x" / "out") as folder:
        (folder / "a.tar").write_text("a")
        assert not (tmp_path / "x" / "out").exists()
    assert os.listdir(tmp_path / "x" / "out") == ["a.tar"]
    assert os.listdir(tmp_path / "x") == ["out"]


def test_failure_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fill(tmp_path / "x" / "y" / "out", fail(KeyError()))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, encoding: str) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot write there: No space left"), new_folder(tmp_path / "a" / "out", "id"):
        pytest.fail("there is nothing to fill")
    assert not any(tmp_path.iterdir())


def test_error_of_the_system_while_filling_is_one_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write: No space left on device"):
        fill(tmp_path / "out", fail(OSError(28, "No space left on device")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "link", "link to nothing", "link to a link"])
def test_empty_folder_or_link_becomes_the_destination(kind: str, tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    if kind != "link to nothing":
        real.mkdir()
    (tmp_path / "second").symlink_to(real)
    if kind == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "second" if kind == "link to a link" else real)
    fill(out)
    assert sorted(os.listdir(out)) == ["a.tar", "dataset.json"]
    assert out.is_symlink() == (kind != "folder")
    assert not left(tmp_path)


def test_folder_that_cannot_be_renamed_onto_is_filled_from_within(tmp_path: Path) -> None:
    """As a mounted volume, or a folder whose parent belongs to somebody else: its identity stays."""
    (tmp_path / "volume").mkdir()
    before = (tmp_path / "volume").stat().st_ino
    fill(tmp_path / "volume")
    assert (tmp_path / "volume").stat().st_ino == before
    assert sorted(os.listdir(tmp_path / "volume")) == ["a.tar", "dataset.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full", "destination is not empty"),
        ("file", "destination is a file"),
        ("file/below", "a part of the destination is a file"),
        ("loop", r"cannot (look|write) there"),
        ("x" * 250, "cannot write there: File name too long"),
    ],
)
def test_destination_that_cannot_be_one_is_refused_before_the_work(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        fill(tmp_path / name, lambda folder: pytest.fail("the work began"))
    assert sorted(os.listdir(tmp_path)) == before


def test_finished_work_is_kept_where_it_cannot_be_put_in_place(tmp_path: Path) -> None:
    aside: list[Path] = []

    def meanwhile(folder: Path) -> None:
        aside.append(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "another's").touch()

    with pytest.raises(UserError, match=r"cannot be put in place.*move the files") as caught:
        fill(tmp_path / "out", meanwhile)
    assert str(aside[0]) in str(caught.value)
    assert (aside[0] / "a.tar").read_text() == "a"


def test_two_that_fill_the_same_empty_folder_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="cannot be put in place"):
        fill(tmp_path / "out", lambda folder: (tmp_path / "out" / "a.tar").write_text("the other's"))
    assert (tmp_path / "out" / "a.tar").read_text() == "the other's"


KILLED = """
import os, signal, sys
from pipeline.data.aside import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "a.tar").write_text("a")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
def test_what_a_killed_build_left_is_swept_by_the_next_and_nothing_else_is(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    where = out if there else tmp_path
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment, check=False)
    assert len(left(where)) == 1
    host = socket.gethostname()
    others = {
        f".out.{host}.{os.getppid()}.partial": "one at work",
        ".out.elsewhere.1.partial": "one on another machine",
        f".out2.{host}.99999999.partial": "one of another destination",
        ".out.partial": "not of this form",
    }
    for name in others if not there else {}:
        (where / name).mkdir()
    fill(out)
    assert sorted(left(where)) == sorted(others if not there else [])
    assert (out / "a.tar").exists()
