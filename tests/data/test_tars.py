import io
import os
import subprocess
import tarfile
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


def test_joined_tars_are_read_to_their_end(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    parts = [make_shard({f"{name}.jpg": pictures[i]}, f"{name}.tar") for i, name in enumerate("abc")]
    joined = parts[0].with_name("joined.tar")
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    data = joined.read_bytes()
    contents = tars.scan(joined)
    images = [sample.image for sample in contents.samples]
    assert [data[i.offset : i.offset + i.size] for i in images if i] == pictures[:3]
    assert contents.passed_over == []
    indexes.write_index(joined, contents.samples)
    assert [sample.key for sample in indexes.read_index(joined)] == ["a", "b", "c"]


def test_index_of_the_first_part_does_not_describe_joined_tars(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    first, second = (make_shard({f"{n}.jpg": pictures[i]}, f"{n}.tar") for i, n in enumerate("ab"))
    indexes.write_index(first, tars.walk(first))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match="the shard holds more"):
        indexes.read_index(first)


def test_bytes_behind_the_end_are_named_and_zeros_are_not(shard: Path) -> None:
    samples = tars.walk(shard)
    with open(shard, "ab") as file:
        file.write(bytes(3 << 20))
    assert tars.scan(shard) == (samples, [])
    with open(shard, "ab") as file:
        file.write(b"junk")
    contents = tars.scan(shard)
    assert contents.samples == samples
    assert [why.split(",")[0] for _, why in contents.passed_over] == ["behind the end of the archive"]
    indexes.write_index(shard, samples)
    assert indexes.read_index(shard) == samples


def test_damaged_header_in_the_middle_is_not_the_end(shard: Path) -> None:
    third = tars.walk(shard)[3].members[0]
    data = bytearray(shard.read_bytes())
    data[third.offset - 512 + 148] ^= 0xFF  # of the checksum
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged: no header at byte {third.offset - 512}"):
        tars.walk(shard)


def test_what_is_in_no_sample_is_named_with_why(tmp_path: Path, pictures: list[bytes]) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE),
            ("folder", tarfile.DIRTYPE),
            ("b.jpg", tarfile.SYMTYPE),
            ("c.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("README", tarfile.REGTYPE),
            ("x/.DS_Store", tarfile.REGTYPE),
            ("a.my notes.txt", tarfile.REGTYPE),
            ("end.", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            info.size = len(pictures[0]) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(pictures[0]))
    contents = tars.scan(path)
    assert [sample.key for sample in contents.samples] == ["a"]
    assert contents.passed_over == [
        ("b.jpg", "a link to a.jpg, which holds no bytes"),
        ("c.jpg", "a link to a.jpg, which holds no bytes"),
        ("pipe.jpg", "neither file nor folder"),
        ("README", "no extension"),
        ("x/.DS_Store", "nothing before the first dot"),
        ("a.my notes.txt", "white space in its extension"),
        ("end.", "no extension behind the first dot"),
    ]


def test_sparse_member_is_passed_over_and_the_next_one_found(tmp_path: Path, pictures: list[bytes]) -> None:
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    (tmp_path / "z.jpg").write_bytes(pictures[0])
    for format_ in ("gnu", "posix"):
        path = tmp_path / f"{format_}.tar"
        command = ["tar", f"--format={format_}", "-C", tmp_path, "-Scf", path, "hole.jpg", "z.jpg"]
        subprocess.run(command, check=True)
        assert path.stat().st_size < 1 << 19, "it is not sparse"
        contents = tars.scan(path)
        assert contents.passed_over == [("hole.jpg", "stored with holes (sparse)")]
        image = contents.samples[0].image
        assert image
        assert path.read_bytes()[image.offset : image.offset + image.size] == pictures[0]


def test_compressed_tar_is_said_to_be_one(shard: Path, tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    for name, module in (("gzip", gzip), ("bzip2", bz2), ("xz", lzma)):
        path = tmp_path / "compressed.tar"
        path.write_bytes(module.compress(shard.read_bytes()))
        with pytest.raises(UserError, match=f"compressed with {name}.*unpack"):
            tars.walk(path)


def test_shard_without_an_image_says_what_it_holds(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    only = make_shard({"a": pictures[0]})
    assert "(a: no extension)" in str(tars.no_image(only, tars.scan(only)))
    other = make_shard({"a.gif": pictures[0], "a.txt": b"x"})
    assert "a: .gif, .txt, none of jpg, jpeg, png, webp, tif, tiff, npy" in str(tars.no_image(other, tars.scan(other)))
    dotted = make_shard({"a.input.jpg": pictures[0]})
    assert "a: .input.jpg, none of target" in str(tars.no_image(dotted, tars.scan(dotted, "target")))


def picture_of(shard: Path, wanted: str | None = None) -> dict[str, str | None]:
    """Name of the image by key."""
    return {sample.key: sample.image and sample.image.name for sample in tars.walk(shard, wanted)}


def test_key_ends_at_the_first_dot_and_one_of_several_images_is_meant(make_shard: Callable[..., Path]) -> None:
    names = ["img.v1.jpg", "s0.input.jpg", "s0.target.png", "s1.a.b.png", "s1.jpg", "s2.seg.png", "s2.x.webp"]
    shard = make_shard({f"v1.2/{name}": b"x" for name in names})
    found = {"img": "img.v1.jpg", "s0": "s0.input.jpg", "s1": "s1.jpg", "s2": "s2.x.webp"}
    assert picture_of(shard) == {f"v1.2/{key}": f"v1.2/{name}" for key, name in found.items()}
    assert [name for name in picture_of(shard, "target").values() if name] == ["v1.2/s0.target.png"]
    assert [name for name in picture_of(shard, "a.b.png").values() if name] == ["v1.2/s1.a.b.png"]
    sample = next(sample for sample in tars.walk(shard) if sample.key == "v1.2/s2")
    assert sample.mask
    assert (sample.mask.name, sample.others) == ("v1.2/s2.seg.png", [])


def test_members_need_not_lie_side_by_side(make_shard: Callable[..., Path]) -> None:
    ends = ("cls", "jpg", "seg.png")
    shard = make_shard({f"{name}.{end}": b"x" for end in ends for name in "abc"})
    samples = tars.walk(shard)
    assert [(s.key, [m.extension for m in s.members]) for s in samples] == [(name, list(ends)) for name in "abc"]
    indexes.write_index(shard, samples)
    assert indexes.read_index(shard) == samples


def test_samples_stand_in_the_order_of_their_images(make_shard: Callable[..., Path]) -> None:
    assert list(picture_of(make_shard(dict.fromkeys(["a.cls", "b.cls", "b.jpg", "a.jpg"], b"x")))) == ["b", "a"]


def write_tar(path: Path, names: list[str], format_: int = tarfile.PAX_FORMAT) -> Path:
    """Members whose content is their number."""
    with tarfile.open(path, "w", format=format_, encoding="utf-8", errors="surrogateescape") as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"%d" % i))
    return path


def numbers(shard: Path) -> list[tuple[str, bytes, bytes | None]]:
    """Key, and the content of image and label, of every sample."""
    data = shard.read_bytes()
    return [(s.key, *(m and data[m.offset : m.offset + m.size] for m in (s.image, s.label))) for s in tars.walk(shard)]


def test_a_second_file_of_its_kind_begins_another_sample_of_the_key(tmp_path: Path) -> None:
    twice = write_tar(tmp_path / "twice.tar", ["a.jpg", "a.cls", "b.jpg", "a.jpg", "a.cls"])
    assert numbers(twice) == [("a", b"0", b"1"), ("b", b"2", None), ("a", b"3", b"4")]
    joined = tmp_path / "joined.tar"
    bare = write_tar(tmp_path / "bare.tar", ["a.jpg", "b.jpg"])
    joined.write_bytes(bare.read_bytes() + twice.read_bytes())
    assert numbers(joined) == [("a", b"0", None), ("b", b"1", None), *numbers(twice)], "a label from the next archive"


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_are_what_they_are_in_either_format(format_: int, tmp_path: Path) -> None:
    long = "/".join(["folder" * 20] * 4) + "/" + "k" * 120
    names = ["./a.jpg", "./a.cls", "x/./b.JPG", "x/./b.Cls", f"{long}.jpg", f"{long}.cls", "caf\udce9.jpg", "ä.JPEG"]
    shard = write_tar(tmp_path / "names.tar", names, format_)
    expected = [
        ("a", b"0", b"1"), ("x/./b", b"2", b"3"), (long, b"4", b"5"), ("caf\udce9", b"6", None), ("ä", b"7", None),
    ]  # fmt: skip
    assert numbers(shard) == expected
    indexes.write_index(shard, tars.walk(shard))
    assert indexes.read_index(shard) == tars.walk(shard)


def test_members_that_are_walked_by_hand_are_those_of_tarfile(
    make_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain ones, then a folder and a name of 100 characters, and from a long name on none is plain enough."""
    names = ["./a.jpg", "a.cls", "x/b.v1.PNG", "noextension", ".hidden", "n" * 96 + ".jpg", "m" * 150 + ".jpg", "c.jpg"]
    shard = make_shard({name: name.encode() * 99 for name in names})
    fast, calls, true = tars.scan(shard), [], tars._walk_any
    monkeypatch.setattr(tars, "_walk_any", lambda *words: calls.append(words[2]) or true(*words))
    assert tars.scan(shard) == fast
    assert calls[0] > 5 * tars.BLOCK, "some are walked by hand"
    monkeypatch.setattr(tars, "_walk_plain", lambda _, start, *words: start)
    assert tars.scan(shard) == fast
    data = bytearray(shard.read_bytes())
    data[1] ^= 1  # of the first name: the checksum is another's
    shard.write_bytes(data)
    monkeypatch.undo()
    with pytest.raises(UserError, match="not a tar archive"):
        tars.scan(shard)
