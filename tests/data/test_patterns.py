import os
from pathlib import Path

import pytest

from pipeline.data.patterns import expand_shards
from pipeline.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"train-{i:06d}.tar").touch()
        (tmp_path / f"train-{i:06d}.idx").touch()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.tar", r"missing shard \(.*globs are not read here.*\{000\.\.009\}"),
        ("train-00000?.tar", "globs are not read here"),
        (".", r"a folder, not a shard \(.*train-\{000000\.\.000002\}\.tar'"),
        ("empty", "a folder, not a shard .*holds none"),
        ("train-000000.idx", r"an index, not a shard .*train-000000\.tar"),
        ("pipe.tar", "not a regular file"),
        ("train-000000.tar/x.tar", "missing shard"),
        ("a\0.tar", "cannot look for the shard"),
    ],
)
def test_what_is_no_shard_is_said_to_be_what_it_is(
    pattern: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        expand_shards(pattern)


@pytest.mark.parametrize("address", ["s3://bucket/a.tar", "https://x.org/{0..9}.tar", "gs://b/a.tar", "pipe:cat a.tar"])
def test_remote_address_is_said_to_be_remote(address: str) -> None:
    with pytest.raises(UserError, match=r"remote address.*copy"):
        expand_shards(address)


def test_slips_of_the_keyboard_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="empty name"):
        expand_shards([""])
    with pytest.raises(UserError, match="more than 1000000 shards"):
        expand_shards("train-{0..9999999}.tar")
    with pytest.raises(UserError, match="unbalanced braces"):
        expand_shards("train-{0..9.tar")


def test_a_shard_that_is_named_twice_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for patterns in (
        ["train-000000.tar", "train-{000000..000001}.tar"],
        ["train-000000.tar", "./train-000000.tar"],
        ["train-000000.tar", str(folder / "train-000000.tar")],
    ):
        with pytest.raises(UserError, match=r"named twice \(.*train-000000\.tar\)"):
            expand_shards(patterns)


def test_home_and_variables_mean_what_a_shell_means(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [folder / "train-000000.tar", folder / "train-000001.tar"]
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SHARDS", str(folder))
    assert expand_shards("~/train-{000000..000001}.tar") == expected
    assert expand_shards("${SHARDS}/train-{000000..000001}.tar") == expected


def test_folder_that_may_not_be_entered_is_no_missing_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)  # root may enter every folder
    with pytest.raises(UserError, match="cannot look for the shard: Permission denied"):
        expand_shards(str(folder / "train-000000.tar"))
