import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data import indexes, tars
from pipeline.data.reader import Dataset
from pipeline.errors import UserError


@pytest.mark.parametrize(
    "names",
    [
        [b"caf\xe9.jpg", b"ok.jpg"],
        [b"caf\xe9 1.jpg", b"ok.jpg"],
        [b"new\nline.jpg", b"ok.jpg"],
        ["line\u2028separator\u00a0.jpg".encode(), b"ok.jpg"],
        [b"x y/" + b"l" * 160 + b".jpg", b"ok.jpg"],
    ],
    ids=["latin-1", "latin-1 and a blank", "new line", "unicode blanks", "long with a blank"],
)
def test_any_name_comes_back_from_the_index(names: list[bytes], tmp_path: Path, pictures: list[bytes]) -> None:
    for name, format_ in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        shard = tmp_path / f"{name}.tar"
        with tarfile.open(shard, "w", format=format_) as tar:
            for member, data in zip(names, pictures, strict=False):
                info = tarfile.TarInfo(member.decode("utf-8", "surrogateescape"))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        walked = tars.walk(shard)
        indexes.write_index(shard, walked)
        assert indexes.read_index(shard) == walked
        dataset = Dataset(str(shard))
        assert [bytes(dataset.image(r)) for r in range(2)] == pictures[:2]
        assert "\n" not in dataset.key(0)
        dataset.key(0).encode()


def test_every_name_of_a_shard_has_an_index_of_its_own() -> None:
    names = ["train-000.tar", "train.000", "train.001", "train.idx", "train"]
    paths = [indexes.index_path(Path(name)).name for name in names]
    assert paths == ["train-000.idx", "train.000.idx", "train.001.idx", "train.idx.idx", "train.idx"]


def test_index_that_cannot_be_read_is_named_and_not_taken_for_none(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    shard = make_shard({"a.jpg": pictures[0]})
    indexes.index_path(shard).mkdir()
    with pytest.raises(UserError, match=r"cannot read the index: Is a directory \(.*\.idx"):
        Dataset(str(shard))


def test_shard_that_cannot_be_read_is_named_in_spite_of_its_index(
    make_shard: Callable[..., Path], pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard({"a.jpg": pictures[0]})
    indexes.write_index(shard, tars.walk(shard))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(shard))

    monkeypatch.setattr("builtins.open", refuse)  # root may read every file
    with pytest.raises(UserError, match=r"cannot read the shard: Permission denied \(.*\.tar"):
        indexes.read_index(shard)
    with pytest.raises(UserError, match=r"cannot read the shard: Permission denied \(.*\.tar"):
        tars.walk(shard)


def test_failed_write_leaves_the_old_index_and_nothing_else(
    make_shard: Callable[..., Path], pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard({"a.jpg": pictures[0]})
    indexes.write_index(shard, tars.walk(shard))
    before = indexes.index_path(shard).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.data.indexes.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        indexes.write_index(shard, tars.walk(shard))
    assert sorted(path.name for path in shard.parent.iterdir()) == ["train-000000.idx", "train-000000.tar"]
    assert indexes.index_path(shard).read_bytes() == before
