import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import catalog, indexes, tars
from pipeline.data.catalog import open_catalog, write_catalog
from pipeline.data.check import verify
from pipeline.data.homes import known_classes
from pipeline.data.reader import Dataset
from pipeline.data.shards import index
from pipeline.errors import UserError


@pytest.fixture
def shards(make_shard: Callable[..., Path], pictures: list[bytes]) -> list[Path]:
    """Three shards of 4, 2 and 3 images; one label is a word, one sample has none, one has no image."""
    contents = [
        {f"a{i}.{end}": pictures[i] if end == "jpg" else b"%d" % i for i in range(4) for end in ("jpg", "cls")},
        {"b0.cls": b"owl", "b0.jpg": pictures[5], "b1.jpg": pictures[6], "b2.cls": b"7"},
        {f"c{i}.png": pictures[7 + i] for i in range(3)},
    ]
    return [make_shard(files, f"train-{i:06d}.tar") for i, files in enumerate(contents)]


def everything(dataset: Dataset) -> list[tuple[str, bytes, object]]:
    def label(record: int) -> object:
        try:
            return dataset.label(record)
        except ValueError as error:
            return str(error)

    return [(dataset.key(r), bytes(dataset.image(r)), label(r)) for r in range(len(dataset))]


def test_catalog_gives_what_the_tars_give(shards: list[Path]) -> None:
    names = [str(path) for path in shards]
    walked = Dataset(names)
    index(names)
    listed = Dataset(names)
    assert everything(listed) == everything(walked)
    assert listed.described() == walked.described()
    assert [path.name for path in walked.without_index] == [path.name for path in shards]
    for path in shards:
        indexes.index_path(path).unlink()
    assert Dataset(names).without_index == []
    assert everything(Dataset(names[1:])) == everything(walked)[4:], "any part of the set, in any order"
    assert everything(Dataset(names[::-1]))[:3] == everything(walked)[6:]


def test_rows_take_twelve_bytes_and_are_shared(shards: list[Path]) -> None:
    index([str(path) for path in shards])
    listing = open_catalog(shards[0].parent)
    assert listing is not None
    assert (shards[0].parent / "rows.npy").stat().st_size == 128 + 12 * 9
    assert isinstance(listing.rows.base, np.memmap)
    first = tars.walk(shards[0])[1]
    assert catalog.place(listing.of(0)[1]) == (first.image.offset, first.image.size)  # type: ignore[union-attr]
    assert [catalog.label(row) for row in listing.of(0)] == [0, 1, 2, 3]


def test_indexing_some_shards_keeps_what_is_known_of_the_others(shards: list[Path], pictures: list[bytes]) -> None:
    index([str(path) for path in shards[:2]])
    before = open_catalog(shards[0].parent)
    index(str(shards[2]))
    after = open_catalog(shards[0].parent)
    assert before is not None
    assert after is not None
    assert (before.names, after.names) == ([p.name for p in shards[:2]], [p.name for p in shards])
    assert np.array_equal(after.rows[:6], before.rows)
    shards[0].unlink()
    index(str(shards[2]))
    assert open_catalog(shards[0].parent).names == [p.name for p in shards[1:]]  # type: ignore[union-attr]


def test_shards_that_are_indexed_at_the_same_time_are_all_listed(shards: list[Path]) -> None:
    with ThreadPoolExecutor(len(shards)) as pool:
        for _ in pool.map(lambda shard: index([str(shard)]), shards):
            pass
    listing = open_catalog(shards[0].parent)
    assert listing is not None
    assert list(listing.names) == [shard.name for shard in shards]
    assert sorted(path.suffix for path in shards[0].parent.iterdir()) == [*[".idx"] * 3, ".json", ".npy", *[".tar"] * 3]


def test_shard_or_rows_that_do_not_fit_are_refused_when_they_are_read(shards: list[Path]) -> None:
    names = [str(path) for path in shards]
    index(names)
    rows = shards[0].parent / "rows.npy"
    content = bytearray(rows.read_bytes())
    content[128 + 4 * 12] ^= 1  # the first row of the second shard
    rows.write_bytes(content)
    dataset = Dataset(names)
    dataset.image(0)
    with pytest.raises(UserError, match=r"rows.npy is damaged.*train-000001.tar\): poa shards index"):
        dataset.image(4)
    index(names[2])
    assert open_catalog(rows.parent).names == [shards[0].name, shards[2].name], "damage is not written anew as sound"  # type: ignore[union-attr]
    index(names)
    rows.write_bytes(content)
    with open(shards[0], "ab") as file:
        file.write(bytes(512))
    for read in (Dataset(names).image, Dataset(names).label):
        with pytest.raises(UserError, match=r"bytes and shards.json says.*train-000000.tar\): poa shards index"):
            read(0)
    problems = [[what for _, what in verdict.problems] for verdict in verify(names, progress=False)]
    assert any("shards.json says" in what for what in problems[0])
    assert any("rows.npy is damaged" in what for what in problems[1])
    index(names)
    Dataset(names).image(4)


def test_catalog_that_is_cut_short_or_of_another_form_is_refused(shards: list[Path]) -> None:
    names = [str(path) for path in shards]
    index(names)
    path = shards[0].parent / "shards.json"
    whole = path.read_text()
    tree = json.loads(whole)
    for text in (whole[:40], "[]", json.dumps({**tree, "format": 2}), json.dumps({**tree, "samples": [4, 2]})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"not a catalog of shards.*shards\.json"):
            Dataset(names)
    path.write_text(whole)
    (path.parent / "rows.npy").unlink()
    with pytest.raises(UserError, match=r"cannot read rows\.npy: No such file.*poa shards index"):
        Dataset(names)
    index(names)  # as it says
    assert len(Dataset(names)) == 9


def test_label_too_large_for_a_row_is_left_to_the_index(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    large = make_shard({"a.jpg": pictures[0], "a.cls": b"%d" % 2**40}, "1.tar")
    small = make_shard({"a.jpg": pictures[0], "a.cls": b"4294967292"}, "2.tar")
    index([str(large), str(small)])
    assert open_catalog(large.parent).names == ["2.tar"]  # type: ignore[union-attr]
    dataset = Dataset([str(large), str(small)])
    assert [dataset.label(r) for r in range(2)] == [2**40, 2**32 - 4]


def test_class_names_travel_in_the_catalog(shards: list[Path]) -> None:
    (shards[0].parent / "classes.txt").write_text("cat\ndog\n")
    index([str(path) for path in shards])
    (shards[0].parent / "classes.txt").unlink()
    assert known_classes(shards[1]) == ["cat", "dog"]
    (shards[0].parent / "classes.txt").write_text("owl\n")
    assert known_classes(shards[1]) == ["owl"], "the file is the user's, and newer"


def test_failed_write_leaves_the_old_catalog(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index([str(path) for path in shards])
    before = {path.name: path.read_bytes() for path in shards[0].parent.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.data.catalog.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_catalog(shards[0].parent, shards)
    assert {path.name: path.read_bytes() for path in shards[0].parent.iterdir()} == before


def test_image_that_is_wanted_stands_in_the_catalog_until_another_is(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    ends = ("input.jpg", "target.jpg")
    files = {f"s{i}.{end}": pictures[2 * i + j] for i in range(2) for j, end in enumerate(ends)}
    one, two = (str(make_shard(files, f"{name}.tar")) for name in "ab")

    def images(image: str | None = None) -> list[bytes]:
        dataset = Dataset([one, two], image=image)
        return [bytes(dataset.image(record)) for record in range(4)]

    index([one, two])
    assert images() == images("input") == [pictures[0], pictures[2]] * 2
    index(one, "target")
    assert images() == images("target.jpg") == images("target") == [pictures[1], pictures[3]] * 2
    assert images("input.jpg") == [pictures[0], pictures[2]] * 2, "by the indexes, which list all images"
    index(two)
    assert images() == images("target")
    assert [verdict.problems[0][1] for verdict in verify([one, two], progress=False)[1:]] == [
        "the key appears in a.tar as well"
    ]
    with pytest.raises(UserError, match=r"none of depth.*a\.tar"):
        Dataset([one], image="depth")
