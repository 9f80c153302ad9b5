import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.folder import open_folder
from pipeline.errors import UserError


@pytest.fixture
def root(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Two classes of two images each."""
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    return tmp_path / "src"


def names(root: Path) -> list[str]:
    return [item.name for item in open_folder(root).splits["train"]]


PLAIN = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_hidden_and_system_folders_are_no_classes_and_shift_none(root: Path) -> None:
    for name in (".thumbs", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".ipynb_checkpoints"):
        shutil.copytree(root / "cat", root / name)
    shutil.copytree(root / "cat", root / "dog" / "@eaDir")
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "empty").mkdir()
    source = open_folder(root)
    assert source.classes == ["cat", "dog"]
    assert [item.name for item in source.splits["train"]] == PLAIN
    assert [item.load()[1] for item in source.splits["train"]] == [0, 0, 1, 1]
    assert set(source.ignored) == {
        *(f"{name} (hidden)" for name in (".thumbs", ".ipynb_checkpoints", "cat/._0.png")),
        *(f"{name} (a system's folder)" for name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "dog/@eaDir")),
        "empty (a folder without images)",
    }


def test_links_to_folders_and_files_are_followed(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "cat", tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    assert names(root) == [*PLAIN, "dog/2.png"]
    (tmp_path / "link").symlink_to(root)
    assert names(tmp_path / "link") == [*PLAIN, "dog/2.png"]


def test_links_in_a_circle_and_to_nothing_are_named(root: Path) -> None:
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "gone").symlink_to("nowhere")
    source = open_folder(root)
    assert [item.name for item in source.splits["train"]] == PLAIN
    assert sorted(source.ignored) == [
        "cat/self (a link back to a folder above)",
        "cat/up (a link back to a folder above)",
        "gone (a broken link)",
        "loop (a broken link)",
    ]


def test_pipe_with_the_name_of_an_image_is_not_read(root: Path) -> None:
    os.mkfifo(root / "cat" / "2.png")
    source = open_folder(root)
    assert source.ignored == ["cat/2.png (not a regular file)"]
    assert len(source.splits["train"]) == 4


def test_odd_names_stand_on_one_line_and_are_found_again(root: Path, encoded: Callable[..., bytes]) -> None:
    picture = encoded(Image.new("RGB", (8, 8), "blue"))
    folder = os.fsencode(root) + b"/new\nline \xe9"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9\t.png", "wb") as file:
        file.write(picture)
    source = open_folder(root)
    assert source.classes == ["cat", "dog", r"new\nline \xe9"]
    (item,) = [item for item in source.splits["train"] if item.load()[1] == 2]
    assert item.name == r"new\nline \xe9/caf\xe9\t.png"
    assert item.load() == (picture, 2)


def test_image_outside_of_class_folders_takes_the_labels_away_and_that_is_said(root: Path) -> None:
    shutil.copy(root / "cat" / "0.png", root / "cover.png")
    source = open_folder(root)
    assert source.classes is None
    assert source.no_labels == "cover.png lies in no class folder"


def test_folder_of_splits_is_no_folder_of_classes(root: Path, tmp_path: Path) -> None:
    for split in ("train", "Val"):
        shutil.copytree(root, tmp_path / "splits" / split)
    with pytest.raises(UserError, match=r"splits, not classes: Val, train .*beginning with .*splits/Val"):
        open_folder(tmp_path / "splits")
    shutil.copytree(root / "cat", tmp_path / "vehicles" / "train")
    assert open_folder(tmp_path / "vehicles").classes == ["train"]


def test_raw_photograph_is_not_taken_for_its_thumbnail(root: Path) -> None:
    (root / "cat" / "shot.dng").write_bytes(b"II*\0" + bytes(100))
    assert open_folder(root).ignored == ["cat/shot.dng"]


def test_file_is_no_folder_and_what_cannot_be_listed_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a file, not a folder"):
        open_folder(root / "cat" / "0.png")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.data.folder.os.scandir", refuse)  # root may list every folder
    with pytest.raises(UserError, match="cannot look there: Permission denied"):
        open_folder(root)
