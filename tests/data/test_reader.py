import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import SourceConfig
from pipeline.data import indexes, tars
from pipeline.data.order import Order, SampleOrder
from pipeline.data.patterns import expand_shards
from pipeline.data.reader import Dataset
from pipeline.data.remote.patience import SourceError
from pipeline.data.shards import index
from pipeline.data.stream import SampleStream
from pipeline.errors import UserError

LIMIT = 178956970


def stream(dataset: Dataset, seed: int = 0, max_pixels: int = LIMIT) -> SampleStream:
    return SampleStream(dataset, window=2, seed=seed, max_pixels=max_pixels)


def test_dataset_agrees_with_webdataset(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    import webdataset

    def content(record: int, extension: str) -> bytes:
        return pictures[record] if extension == "jpg" else b"%d" % record

    orders = (("jpg", "cls"), ("cls", "jpg"))
    paths = [
        make_shard({f"k{r}.{e}": content(r, e) for r in range(4 * s, 4 * s + 4) for e in order}, f"{s}.tar")
        for s, order in enumerate(orders)
    ]
    indexes.write_index(paths[0], tars.walk(paths[0]))
    dataset = Dataset([str(path) for path in paths])
    samples = [s for path in paths for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    theirs = [(s["__key__"], s["jpg"], int(s["cls"])) for s in samples]
    ours = [(dataset.key(r), bytes(dataset.image(r)), dataset.label(r)) for r in range(len(dataset))]
    assert ours == theirs
    assert [dataset.shard(r).name for r in range(8)] == ["0.tar"] * 4 + ["1.tar"] * 4


def test_missing_label_is_none_and_missing_image_is_said(
    make_shard: Callable[..., Path], pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_shard({"a.jpg": pictures[0], "b.cls": b"1", "c.jpg": pictures[1], "c.cls": b"2"})
    with caplog.at_level(logging.WARNING):
        dataset = Dataset(str(path))
    assert [dataset.label(r) for r in range(len(dataset))] == [None, 2]
    assert "1 of 1 shards have no index" in caplog.text
    assert "1 samples have no image" in caplog.text


def test_hole_in_a_pattern_is_named(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    path = make_shard({"a.jpg": pictures[0]}, "train-000000.tar")
    make_shard({"a.jpg": pictures[0]}, "train-000002.tar")
    with pytest.raises(UserError, match=r"missing shard \(.*train-000001\.tar\)"):
        expand_shards(str(path.parent / "train-{000000..000002}.tar"))
    with pytest.raises(UserError, match="2 of 4 shards missing"):
        expand_shards([str(path.parent / "train-{000000..000003}.tar")])
    assert len(expand_shards(str(path.parent / "train-00000{0,2}.tar"))) == 2


def test_a_shard_that_two_sources_name_is_refused(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    path = make_shard({"k.jpg": pictures[0]}, "0.tar")
    twice = [SourceConfig(name="a", url=str(path)), SourceConfig(name="b", url=f"{path.parent}/./0.tar")]
    with pytest.raises(UserError, match=r"named twice \(.*/0\.tar\): name it once"):
        Dataset(twice)


def test_shards_without_images_are_refused(make_shard: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no image"):
        Dataset(str(make_shard({"a.cls": b"1"})))
    with pytest.raises(UserError, match="holds no image"):
        Dataset(str(make_shard({})))
    with pytest.raises(UserError, match="no shards"):
        Dataset([])


def test_rejected_sample_is_replaced_alike_whatever_was_seen_before(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    files = {f"k{i:02d}.jpg": data for i, data in enumerate(pictures[:10])}
    files |= {"k03.jpg": b"", "k04.jpg": pictures[4][:-300], "k05.jpg": b"<html>"}
    dataset = Dataset(str(make_shard(files)))
    fresh = stream(dataset)
    forwards = [fresh.pick(position) for position in range(40)]
    backwards = stream(dataset)
    assert [backwards.pick(position) for position in reversed(range(40))] == forwards[::-1]
    reasons = {record: reason for picked in forwards for record, reason in picked.rejected}
    assert reasons == {3: "empty", 4: "truncated", 5: "format"}
    for position, picked in enumerate(forwards):
        assert picked.record not in reasons
        assert bool(picked.rejected) == (fresh.order(position) in reasons)


def test_verdict_reached_later_gives_the_same_replacement(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    dataset = Dataset(str(make_shard({f"k{i}.jpg": data for i, data in enumerate(pictures[:10])})))
    known, learning = stream(dataset), stream(dataset)
    known.reject(7, "decode")
    for position in range(30):
        if learning.pick(position).record == 7:
            learning.reject(7, "decode")
        assert learning.pick(position) == known.pick(position)


def test_only_bad_images_end_in_one_clear_error(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    dataset = Dataset(str(make_shard({"a.jpg": b"", "b.jpg": pictures[0]})))
    with pytest.raises(UserError, match=r"64 unusable images in a row.*poa shards verify"):
        stream(dataset, max_pixels=1).pick(0)


def test_exif_is_hidden_from_the_decoder_that_may_crash_on_it(
    make_shard: Callable[..., Path], encoded: Callable[..., bytes]
) -> None:
    tiff = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\xff\xff\xff\xff"
    image = Image.new("RGB", (20, 10))  # the block points to a second directory far outside
    dataset = Dataset(str(make_shard({"a.png": encoded(image, exif=tiff), "b.jpg": encoded(image, "JPEG", exif=tiff)})))
    for position in range(2):
        picked = stream(dataset).pick(position)
        assert picked.header.size == (20, 10)
        assert tiff[6:20] in picked.data
        assert not Image.open(io.BytesIO(picked.data)).getexif()


def test_shard_that_vanishes_ends_the_stream_and_leaves_no_sample_out(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    gone, kept = make_shard({"a.jpg": pictures[0]}, "1.tar"), make_shard({"b.jpg": pictures[1]}, "2.tar")
    dataset = Dataset([str(gone), str(kept)])
    gone.unlink()
    positions = {stream(dataset).order(position): position for position in range(2)}
    assert not stream(dataset).pick(positions[1]).rejected
    with pytest.raises(SourceError, match=r"cannot be read: No such file or directory \(.*1\.tar\): bring it back"):
        stream(dataset).pick(positions[0])


@pytest.mark.parametrize("indexed", [False, True])
def test_tar_without_any_member_is_left_out_by_name(
    make_shard: Callable[..., Path], pictures: list[bytes], caplog: pytest.LogCaptureFixture, indexed: bool
) -> None:
    """As a writer leaves one that opened its next shard and was done."""
    full = [make_shard({f"{s}{i}.jpg": pictures[i] for i in range(3)}, f"{s}.tar") for s in range(2)]
    paths = [str(path) for path in (full[0], make_shard({}, "2.tar"), full[1], make_shard({}, "3.tar"))]
    if indexed:
        assert [report.samples for report in index(paths)] == [3, 0, 3, 0]
        assert not (full[0].parent / "2.idx").exists()
    with caplog.at_level(logging.WARNING):
        dataset = Dataset(paths)
    assert [str(path) for path in dataset.paths] == [paths[0], paths[2]]
    assert f"2 of 4 shards hold nothing and are left out: {paths[1]}" in caplog.text
    assert len(dataset) == 6
    assert dataset.described() == Dataset([paths[0], paths[2]]).described()
    with pytest.raises(UserError, match=r"holds no image \(.*2\.tar\)"):
        Dataset([SourceConfig(name="a", url=paths[0]), SourceConfig(name="b", url=paths[1])])
    (full[0].parent / "4.tar").touch()
    with pytest.raises(UserError, match=r"4\.tar"):
        Dataset([*paths, str(full[0].parent / "4.tar")])


def test_substitute_is_near_where_reading_far_away_is_dear(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    """With lanes it comes from the window of two shards that is being read; in the plain order from anywhere."""
    paths = [
        str(make_shard({f"{s}{i}.jpg": pictures[i] for i in range(3)} | {f"{s}x.jpg": b""}, f"{s}.tar"))
        for s in range(8)
    ]
    dataset = Dataset(paths)
    for order, far in ((Order(2, 0), False), (Order(1, 64), False), (Order(), True)):
        read = SampleStream(dataset, window=2, seed=0, max_pixels=LIMIT, order=order)
        shards = [SampleOrder(np.full(8, 4), 2, 0, lanes=order.lanes).near(p) // 4 for p in range(64)]
        picked = [read.pick(position) for position in range(64)]
        assert sum(bool(p.rejected) for p in picked) >= 16
        assert far == any(p.record // 4 not in near for p, near in zip(picked, shards, strict=True))
