import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.cli import main
from pipeline.data import indexes, tars
from pipeline.data.check import stats, verify
from pipeline.data.encode import encode
from pipeline.data.images import BadImage, decode
from pipeline.data.reader import Dataset
from pipeline.data.shards import build, index
from pipeline.data.sources import open_source
from pipeline.data.values import has_values
from pipeline.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, pictures: list[bytes]) -> Path:
    """12 JPEG files in two classes, a text file, and two files that are no images inside."""
    root = tmp_path / "photos"
    for i, picture in enumerate(pictures[:12]):
        path = root / ("shoes" if i % 3 else "hats") / f"IMG {i}.part.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    (root / "hats" / "notes.txt").write_text("no image")
    (root / "hats" / "empty.jpg").write_bytes(b"")
    (root / "shoes" / "cut.jpg").write_bytes(pictures[0][:900])
    return root


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_folder_becomes_shards_and_nothing_is_lost(folder: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    report = build(str(folder), tmp_path / "out", per_shard=5, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"train-{i:06d}.tar" for i in range(3)]
    dataset = Dataset(str(tmp_path / "out" / "train-{000000..000002}.tar"))
    packed = [(bytes(dataset.image(r)), dataset.label(r)) for r in range(len(dataset))]
    assert dict(packed) == {picture: int(i % 3 > 0) for i, picture in enumerate(pictures[:12])}
    assert [image for image, _ in packed] != pictures[:12], "not shuffled"
    assert report.classes == ["hats", "shoes"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "hats\nshoes\n"
    assert sorted(report.left_out) == [("hats/empty.jpg", "empty"), ("shoes/cut.jpg", "truncated")]
    assert report.ignored == ["hats/notes.txt"]
    sources = dict(line.split("\t") for line in (tmp_path / "out" / "sources.tsv").read_text().splitlines())
    for record in range(len(dataset)):
        assert (folder / sources[dataset.key(record)]).read_bytes() == dataset.image(record)


def test_manifest_counts_and_checksums_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    import hashlib

    build(str(folder), tmp_path / "out", per_shard=5, val_fraction=0.25, progress=False)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    # 14 candidates, of which 4 for validation; two of the 14 cannot be decoded
    assert manifest["samples"]["train"] + manifest["samples"]["val"] == 12
    for split, entries in manifest["shards"].items():
        for entry in entries:
            data = (tmp_path / "out" / entry["name"]).read_bytes()
            assert entry["name"].startswith(split)
            assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert entry["samples"] == len(indexes.read_index(tmp_path / "out" / entry["name"]))


def test_same_options_give_the_same_bytes_and_another_seed_another_order(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build(str(folder), tmp_path / name, seed=seed, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["train-000000.tar"] != contents(tmp_path / "three")["train-000000.tar"]


def test_keys_of_two_builds_differ(tmp_path: Path, pictures: list[bytes]) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(pictures[i])
        build(str(tmp_path / name), tmp_path / f"out-{name}", progress=False)
    both = [str(tmp_path / f"out-{name}" / "train-000000.tar") for name in "ab"]
    assert [verdict.problems for verdict in verify(both, progress=False)] == [[], []]


def test_folder_without_classes_has_no_labels(folder: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    (folder / "loose.jpeg").write_bytes(pictures[20])
    (folder / "no extension").write_bytes(pictures[21])
    report = build(str(folder), tmp_path / "out", progress=False)
    dataset = Dataset(str(tmp_path / "out" / "train-000000.tar"))
    assert report.classes is None
    assert len(dataset) == 14
    assert {dataset.label(r) for r in range(14)} == {None}


def test_shrinking_touches_only_what_is_larger(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    small, large, tall = (Image.new("RGB", size, "red") for size in ((40, 30), (400, 200), (33, 90)))
    (root / "small.png").write_bytes(encoded(small, compress_level=0))
    (root / "large.jpg").write_bytes(encoded(large, "JPEG"))
    (root / "tall.png").write_bytes(encoded(tall))
    build(str(root), tmp_path / "out", shorter_side=32, progress=False)
    dataset = Dataset(str(tmp_path / "out" / "train-000000.tar"))
    images = [dataset.image(r) for r in range(3)]
    assert sorted(decode(image).size for image in images) == [(32, 87), (40, 30), (64, 32)]
    assert encoded(small, compress_level=0) in images
    assert sorted(bytes(image[:2]) for image in images) == [b"\x89P", b"\x89P", b"\xff\xd8"]


def test_what_training_cannot_read_is_stored_anew_and_upright(
    tmp_path: Path, pictures: list[bytes], encoded: Callable[..., bytes]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode(pictures[0])
    for format_ in ("BMP", "GIF", "TIFF"):
        extension, data = encode(encoded(picture, format_, **({"exif": exif} if format_ == "TIFF" else {})))
        assert (extension, Image.open(io.BytesIO(data)).format) == ("png", "PNG")
        assert decode(data).size == (picture.size[::-1] if format_ == "TIFF" else picture.size)
    assert encode(pictures[0]) == ("jpg", pictures[0])
    lax = pictures[0][:2] + b"\xff\x00" + pictures[0][2:]  # Pillow overlooks it, DALI does not
    extension, data = encode(lax)
    assert extension == "png"
    assert np.array_equal(np.asarray(decode(data)), np.asarray(picture))
    with pytest.raises(BadImage, match="truncated"):
        encode(pictures[0][:-200])


def test_digits_are_split_once_and_for_all(digits: Path) -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    train = Dataset(str(digits / "train-{000000..000002}.tar"))
    val = Dataset(str(digits / "val-000000.tar"))
    assert (len(train), len(val)) == (1438, 359)
    sources = dict(line.split("\t") for line in (digits / "sources.tsv").read_text().splitlines())
    assert len(set(sources.values())) == len(truth.images)
    for dataset in (train, val):
        for record in range(0, len(dataset), 49):
            number = int(sources[dataset.key(record)].removeprefix("digit-"))
            pixels = np.asarray(decode(dataset.image(record)))[..., 0]
            assert np.abs(pixels / 255 * 16 - truth.images[number]).max() < 0.04
            assert dataset.label(record) == truth.target[number]


def write_mnist(root: Path) -> np.ndarray:
    """The four files of a very small MNIST, as torchvision wants them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for name, part in (("train", images[:20]), ("t10k", images[20:])):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, len(part), 28, 28) + part.tobytes())
        labels = bytes(i % 10 for i in range(len(part)))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(part)) + labels)
    return images


def test_torchvision_splits_are_kept(tmp_path: Path) -> None:
    images = write_mnist(tmp_path / "tv")
    report = build(f"torchvision:MNIST:{tmp_path / 'tv'}", tmp_path / "out", progress=False)
    assert report.samples == {"train": 20, "val": 10}
    assert report.classes is not None
    assert len(report.classes) == 10
    val = Dataset(str(tmp_path / "out" / "val-000000.tar"))
    packed = {np.asarray(decode(val.image(r)))[..., 0].tobytes(): val.label(r) for r in range(10)}
    assert packed == {image.tobytes(): i for i, image in enumerate(images[20:])}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such folder"),
        ("sklearn:iris", "unknown data set"),
        ("torchvision:CIFAR11", "no data set 'CIFAR11'.*CIFAR10"),
        ("torchvision:VisionDataset", "no data set"),
        ("torchvision:CIFAR10:nowhere", r"files are missing.*--download"),
    ],
)
def test_impossible_source_is_one_clear_error(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "out", progress=False)
    assert not any(tmp_path.glob("*out*"))


def test_empty_or_undecodable_folder_and_full_destination_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        build(str(tmp_path / "empty"), tmp_path / "out", progress=False)
    (tmp_path / "empty" / "a.jpg").write_text("no")
    with pytest.raises(UserError, match="none of 1 images can be decoded"):
        build(str(tmp_path / "empty"), tmp_path / "out", progress=False)
    assert not any(tmp_path.glob("*out*")), "a failed build leaves nothing behind"
    before = contents(tmp_path / "empty")
    with pytest.raises(UserError, match="destination is not empty"):
        build(str(folder), tmp_path / "empty", progress=False)
    assert contents(tmp_path / "empty") == before


def test_index_is_what_build_wrote(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "val-000000.tar"
    copy.write_bytes((digits / copy.name).read_bytes())
    assert [report.samples for report in index(str(copy))] == [359]
    assert indexes.index_path(copy).read_bytes() == indexes.index_path(digits / copy.name).read_bytes()


@pytest.fixture
def sound(folder: Path, tmp_path: Path) -> Path:
    build(str(folder), tmp_path / "out", progress=False)
    return tmp_path / "out" / "train-000000.tar"


def test_sound_shard_has_no_problems(sound: Path) -> None:
    (verdict,) = verify(str(sound), progress=False)
    assert (verdict.samples, verdict.problems) == (12, [])


def test_verify_names_what_is_wrong(sound: Path, spoil: Callable[[bytes], bytes]) -> None:
    image = tars.walk(sound)[3].image
    assert image
    data = bytearray(sound.read_bytes())
    data[image.offset : image.offset + image.size] = spoil(bytes(data[image.offset : image.offset + image.size]))
    sound.write_bytes(data)
    problems = verify(str(sound), progress=False)[0].problems
    assert [key[: len("train_00000003")] for key, problem in problems if problem == "decode"] == ["train_00000003"]
    assert ("", "another checksum than in dataset.json") in problems
    assert len(problems) == 2


def test_verify_wants_every_image_to_please_pillow_and_dali(
    make_shard: Callable[..., Path], pictures: list[bytes], encoded: Callable[..., bytes]
) -> None:
    text = PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)  # more than Pillow will unpack
    image, exif = Image.new("L", (9, 9)), Image.Exif()
    exif[0x0112] = 1
    announced = encoded(image, "WEBP", exif=exif).replace(b"EXIF", b"none")  # Pillow does not miss the block
    shard = make_shard({"a.png": encoded(image, pnginfo=text), "b.webp": announced, "c.jpg": pictures[0]})
    index(str(shard))
    assert verify(str(shard), progress=False)[0].problems == [("a", "decode"), ("b", "decode")]


def test_files_are_found_in_the_order_of_their_names(folder: Path) -> None:
    names = [item.name for item in open_source(str(folder)).splits["train"]]
    assert names == sorted(names)


def test_verify_sees_labels_keys_and_indexes(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    one = make_shard({"a.jpg": pictures[0], "a.cls": b"cat", "b.cls": b"1"}, "1.tar")
    two = make_shard({"a.jpg": pictures[1]}, "2.tar")
    index([str(one)])
    indexes.index_path(one).rename(indexes.index_path(two))
    first, second = verify([str(one), str(two)], progress=False)
    assert sorted(first.problems) == [("", "no index"), ("a", "label is no number"), ("b", "no image")]
    assert [problem.split(":")[0] for _, problem in second.problems] == [
        "the index does not describe its shard",
        "the key appears in 1.tar as well",
    ]


def test_statistics_are_those_of_the_pictures(sound: Path, pictures: list[bytes]) -> None:
    found = stats(str(sound))
    sizes = [Image.open(io.BytesIO(picture)).size for picture in pictures[:12]]
    assert (found.samples, found.shards, found.formats, found.classes) == (12, 1, {"jpeg": 12}, {0: 4, 1: 8})
    assert (found.width[0], found.width[2], found.width[4]) == tuple(np.percentile([w for w, _ in sizes], (0, 50, 100)))
    assert found.height[4] == max(h for _, h in sizes)


def test_commands_report_and_exit_as_promised(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["shards", "build", str(folder), str(out), "--per-shard", "7"]) == 0
    captured = capsys.readouterr()
    assert "train: 12 images in 2 shards" in captured.out
    assert "left out" in captured.err
    assert "shoes/cut.jpg (truncated)" in captured.err
    assert "packing" in captured.err, "a progress bar"
    pattern = str(out / "train-{000000..000001}.tar")
    assert main(["shards", "verify", pattern]) == 0
    capsys.readouterr()
    assert main(["shards", "stats", pattern, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 12
    assert main(["shards", "index", pattern]) == 0
    indexes.index_path(out / "train-000001.tar").unlink()
    assert main(["shards", "verify", pattern]) == 1
    assert "no index" in capsys.readouterr().out
    assert main(["shards", "build", str(folder), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the destination is not empty (")
    assert error.count("\n") == 1


def test_only_what_both_decoders_see_alike_is_kept_byte_for_byte(
    make_shard: Callable[..., Path], pictures: list[bytes], encoded: Callable[..., bytes]
) -> None:
    jpeg = encoded(decode(pictures[0]).convert("CMYK"), "JPEG")
    marker = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", jpeg, marker + 2)
    shard = make_shard({"a.jpg": jpeg[:marker] + jpeg[marker + 2 + length :], "b.jpg": jpeg})
    index(str(shard))
    assert verify(str(shard), progress=False)[0].problems == [("a", "pixels")]


def test_verify_knows_what_is_passed_over(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    shard = make_shard({"a.jpg": pictures[0], "README": b"x", "b": pictures[1], "c.1.gif": pictures[2]})
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("d.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(info)
    (report,) = index(str(shard))
    assert (report.samples, report.without_image) == (1, 1)
    assert [name for name, _ in report.left_out] == ["c", "README", "b", "d.jpg"]
    (verdict,) = verify(str(shard), progress=False)
    assert verdict.left_out == [("README", "no extension"), ("b", "no extension")]
    assert [key for key, _ in verdict.problems] == ["d.jpg", "c"]
    assert verdict.problems[1][1] == "no image"


def test_verify_names_what_8_bit_rgb_training_does_not_read(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    tiff, values = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 40)).save(tiff, "TIFF")
    np.save(values, np.zeros((40, 40, 3), np.uint8))
    valued = {"a.tif": tiff.getvalue(), "b.npy": values.getvalue()}
    whys = [("a", "a tif: read only with data.value_range"), ("b", "a npy: read only with data.value_range")]
    for files, lost in (({**valued, "c.jpg": pictures[0]}, True), (valued, False)):
        shard = make_shard(files)
        index(str(shard))
        (verdict,) = verify(str(shard), progress=False)
        found, nothing = (verdict.problems, verdict.left_out) if lost else (verdict.left_out, verdict.problems)
        assert [(key, why.partition(",")[0]) for key, why in found] == whys
        assert nothing == []
        dataset = Dataset([str(shard)])
        readable = [key for r, key in enumerate("abc"[: len(dataset)]) if not has_values(dataset.image(r))]
        assert readable == ["c"] * lost


def test_second_image_of_a_sample_is_named(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    shard = make_shard({"a.jpg": pictures[0], "a.png": pictures[1]})
    other = [("a.png", "not the image that is taken of its sample")]
    assert index(str(shard))[0].left_out == other
    assert verify(str(shard), progress=False)[0].left_out == other


def test_labels_are_read_in_one_way_by_all(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    labels = [b"3", b" 4\n", b"+1", b"1_0", b"-1", b"cat", b"9" * 20, b""]
    files = {f"{i}.{e}": d for i, label in enumerate(labels) for e, d in (("jpg", pictures[i]), ("cls", label))}
    shard = make_shard(files)
    index(str(shard))
    problems = dict(verify(str(shard), progress=False)[0].problems)
    assert sorted(problems) == ["2", "3", "4", "5", "6", "7"]
    found = stats(str(shard))
    assert found.classes == {3: 1, 4: 1}
    assert found.bad_labels == {"label is no number": 5, "label is beyond 64 bits": 1}
    dataset = Dataset(str(shard))
    assert [dataset.label(r) for r in range(2)] == [3, 4]
    for record in range(2, 8):
        with pytest.raises(ValueError, match="label is"):
            dataset.label(record)


def test_label_without_a_class_name_is_a_problem(sound: Path) -> None:
    (sound.parent / "classes.txt").write_text("hats\n")
    problems = {problem for _, problem in verify(str(sound), progress=False)[0].problems}
    assert problems == {"label 1 has no name in classes.txt"}


def test_joined_shards_are_indexed_and_verified_whole(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    one, two = (make_shard({f"{name}.jpg": pictures[i]}, f"{name}.tar") for i, name in enumerate("ab"))
    index(str(one))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert ("", "the index does not describe its shard: the shard holds more") in verify(str(one), progress=False)[
        0
    ].problems
    assert [report.samples for report in index(str(one))] == [2]
    assert [(v.samples, v.problems, v.left_out) for v in verify(str(one), progress=False)] == [(2, [], [])]


def test_names_and_classes_keep_to_their_lines(tmp_path: Path, pictures: list[bytes]) -> None:
    root = os.fsencode(tmp_path / "photos")
    for i, name in enumerate((b"a\nb/0.jpg", b"a\nb/1\t.jpg", b"c/caf\xe9.jpg", b"c/bad\r.jpg")):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(pictures[i] if i < 3 else b"")
    report = build(str(tmp_path / "photos"), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\\nb\nc\n"
    lines = (tmp_path / "out" / "sources.tsv").read_bytes().decode("ascii").splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == ["a\\nb/0.jpg", "a\\nb/1\\t.jpg", "c/caf\\xe9.jpg"]
    assert report.left_out == [("c/bad\\r.jpg", "empty")]
    (tmp_path / "out" / "dataset.json").read_bytes().decode("ascii")


def test_what_is_left_out_keeps_its_own_reason(tmp_path: Path, pictures: list[bytes]) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
    files = {"a.jpg": pictures[0], "ps.jpg": eps, "cut.gif": b"GIF89a", "f.pfm": b"Pf 2 2 -1.0\n" + bytes(16)}
    (tmp_path / "photos").mkdir()
    for name, data in files.items():
        (tmp_path / "photos" / name).write_bytes(data)
    report = build(str(tmp_path / "photos"), tmp_path / "out", progress=False)
    assert report.samples == {"train": 1}
    reasons = dict(report.left_out)
    assert (reasons["ps.jpg"], reasons["f.pfm"]) == ("format", "precision")
    assert reasons["cut.gif"] in ("format", "decode")


def test_validation_leaves_something_to_train_on(tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(pictures[i])
    assert build(str(tmp_path / "photos"), tmp_path / "out", val_fraction=0.9, progress=False).samples == {
        "train": 1,
        "val": 2,
    }
    with pytest.raises(UserError, match="--seed"):
        build(str(tmp_path / "photos"), tmp_path / "two", seed=-1, progress=False)


def test_disk_that_fills_up_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    command = "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["shards", "build", str(folder), str(tmp_path / "out")]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", sys.executable, "-c", command, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "error: cannot write: File too large (" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not any(tmp_path.glob("*out*"))


def test_stopped_build_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = (
        "import os, signal, sys\nfrom pipeline.cli import main\nfrom pipeline.data import packing\n"
        "packing.encode = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or ('jpg', b'')\nsys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", command, "shards", "build", str(folder), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 143
    assert "stopped: nothing is kept" in ended.stderr
    assert not any(tmp_path.glob("*out*"))


def test_torchvision_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data sets open files with Pillow themselves."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    write_mnist(tmp_path / "tv")
    open_source(f"torchvision:MNIST:{tmp_path / 'tv'}")
    assert not EpsImagePlugin.has_ghostscript()


def test_name_that_the_terminal_cannot_show_ends_no_command(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    shard = make_shard({"a.jpg": pictures[0]}, "schön.tar")
    command = "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run(
        [sys.executable, "-c", command, "shards", "index", str(shard)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.endswith("sch\\xf6n.tar: 1 samples\n")
