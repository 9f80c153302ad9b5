import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import indexes, tars
from pipeline.errors import UserError


@pytest.fixture
def shard(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    return make_shard(
        {f"k{i}.{ext}": data for i in range(6) for ext, data in (("jpg", pictures[i]), ("cls", b"%d" % i))}
    )


def test_walk_agrees_with_webdataset(shard: Path) -> None:
    import webdataset

    theirs = [(s["__key__"], s["jpg"], s["cls"]) for s in webdataset.WebDataset(str(shard), shardshuffle=False)]
    data = shard.read_bytes()

    def content(member: tars.Member | None) -> bytes:
        assert member
        return data[member.offset : member.offset + member.size]

    assert [(s.key, content(s.image), content(s.label)) for s in tars.walk(shard)] == theirs


def test_dali_reads_a_shard_through_our_index(shard: Path, pictures: list[bytes]) -> None:
    from nvidia.dali import fn, pipeline_def

    indexes.write_index(shard, tars.walk(shard))

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def reader():
        paths, index_paths = str(shard), str(indexes.index_path(shard))
        return tuple(fn.readers.webdataset(paths=paths, index_paths=index_paths, ext=["jpg", "cls"]))

    pipeline = reader()
    pipeline.build()
    images, labels = pipeline.run()
    assert [bytes(np.asarray(images.at(i))) for i in range(6)] == pictures[:6]
    assert [bytes(np.asarray(labels.at(i))) for i in range(6)] == [b"%d" % i for i in range(6)]


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg"], ["a a.jpg", "b.jpg"], ["x/a.jpg", "x/y/b.c.jpg"], ["ä.jpg", "b" * 150 + ".jpg"]]
)
def test_index_gives_back_what_was_walked(
    names: list[str], make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    shard = make_shard(dict(zip(names, pictures, strict=False)))
    walked = tars.walk(shard)
    indexes.write_index(shard, walked)
    read = indexes.read_index(shard)
    assert [s.key for s in read] == [s.key for s in walked]
    assert [[m[:3] for m in s.members] for s in read] == [[m[:3] for m in s.members] for s in walked]


def test_members_without_extension_or_image_are_no_samples(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    shard = make_shard({"README": b"x", ".hidden": b"x", "a.jpg": pictures[0], "b.txt": b"x", "c.JPG": pictures[1]})
    samples = tars.walk(shard)
    assert [(s.key, s.image is not None) for s in samples] == [("a", True), ("b", False), ("c", True)]
    indexes.write_index(shard, [s for s in samples if s.image])
    assert [s.key for s in indexes.read_index(shard)] == ["a", "c"]


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_tar_is_refused_by_name(keep: float, shard: Path) -> None:
    os.truncate(shard, int(shard.stat().st_size * keep))
    with pytest.raises(UserError, match=f"truncated.*{shard.name}.*copy it again"):
        tars.walk(shard)


def test_tar_cut_between_members_is_refused(shard: Path) -> None:
    third = tars.walk(shard)[3].members[0]
    os.truncate(shard, third.offset - 512)
    with pytest.raises(UserError, match="truncated"):
        tars.walk(shard)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"no tar at all" * 1000)
    with pytest.raises(UserError, match="not a tar archive"):
        tars.walk(path)


def test_index_of_another_shard_is_refused(shard: Path, make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    others = {f"k{i}.jpg": data for i, data in enumerate(pictures[6:12])}
    other = make_shard(others, "train-000001.tar")
    indexes.write_index(other, tars.walk(other))
    indexes.index_path(other).rename(indexes.index_path(shard))
    with pytest.raises(UserError, match=r"does not describe its shard.*poa shards index"):
        indexes.read_index(shard)


def test_index_with_names_of_another_shard_is_refused(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    one, two = make_shard({"a.jpg": pictures[0]}, "1.tar"), make_shard({"b.jpg": pictures[0]}, "2.tar")
    indexes.write_index(one, tars.walk(one))
    indexes.index_path(one).rename(indexes.index_path(two))
    with pytest.raises(UserError, match="another member"):
        indexes.read_index(two)


def test_index_with_another_size_is_refused(shard: Path) -> None:
    path = indexes.write_index(shard, tars.walk(shard))
    size = tars.walk(shard)[-1].members[0].size
    path.write_text(path.read_text().replace(f" {size} ", f" {size - 1} "))
    with pytest.raises(UserError, match="another member"):
        indexes.read_index(shard)


def test_index_older_than_appended_samples_is_refused(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    files = {f"k{i}.jpg": data for i, data in enumerate(pictures[:6])}
    shard = make_shard(dict(list(files.items())[:3]))
    indexes.write_index(shard, tars.walk(shard))
    make_shard(files)
    with pytest.raises(UserError, match="the shard holds more"):
        indexes.read_index(shard)


@pytest.mark.parametrize(
    "text", ["", "v9 1\n", "v1.2 2\njpg 512 10 a.jpg\n", "v1.2 1\njpg x 10 a.jpg\n", "v1.2 1\njpg 513\n"]
)
def test_malformed_index_is_refused(text: str, shard: Path) -> None:
    indexes.index_path(shard).write_text(text)
    with pytest.raises(UserError, match="does not describe its shard"):
        indexes.read_index(shard)
