import json
import os
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest

from pipeline.data import indexes, tars
from pipeline.data.folder import _load as load
from pipeline.data.items import Item
from pipeline.data.packing import Job, Packed, done_path, header, pack, pack_all
from pipeline.data.shards import build
from pipeline.errors import UserError


@pytest.fixture
def items(tmp_path: Path, pictures: list[bytes]) -> list[Item]:
    """Six images, of which the third is none."""
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(pictures[i] if i != 2 else b"no")
    return [Item(f"{i}.jpg", partial(load, f"{tmp_path}/{i}.jpg", i)) for i in range(6)]


def jobs(folder: Path, items: list[Item]) -> list[Job]:
    folder.mkdir(exist_ok=True)
    return [
        Job(folder / f"train-{i:06d}.tar", "train", 2 * i, items[2 * i : 2 * i + 2], None, False, 1) for i in range(3)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_pack_what_one_packs(items: list[Item], tmp_path: Path) -> None:
    seen: list[int] = []
    alone = list(pack_all(jobs(tmp_path / "one", items), 1, seen.append))
    together = list(pack_all(jobs(tmp_path / "two", items), 2, seen.append))
    assert together == alone
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(seen) == 12
    assert [packed.left_out for packed in alone] == [[], [("2.jpg", "format")], []]


def test_index_that_is_written_on_the_way_is_that_of_the_tar(items: list[Item], tmp_path: Path) -> None:
    job = jobs(tmp_path / "out", items)[0]
    packed = pack(job)
    assert packed.entry
    assert packed.entry.bytes == job.path.stat().st_size
    assert indexes.read_index(job.path) == tars.walk(job.path)
    assert [sample.key for sample in tars.walk(job.path)] == [key for key, _ in packed.sources]


def test_header_is_tarfiles() -> None:
    for name, size in (("a.jpg", 0), ("k" * 96 + ".jpg", 8**11 - 1), ("train_00000001_0123456789.seg.png", 6510)):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = size, 0o444, "root", "root"
        assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_process_that_is_killed_is_one_clear_error(items: list[Item], tmp_path: Path) -> None:
    first, *others = jobs(tmp_path / "out", items)
    first.items = [Item("x.jpg", partial(signal.raise_signal, signal.SIGKILL))]
    with pytest.raises(UserError, match=r"a process that packs has died.*complete shards are kept"):
        list(pack_all([first, *others], 2, lambda _: None))


def test_shard_that_is_done_is_not_packed_again(items: list[Item], tmp_path: Path) -> None:
    first, *_ = jobs(tmp_path / "out", items)
    packed = pack(first)
    gone = Job(
        first.path, "train", 0, [Item(item.name, partial(load, "gone", 0)) for item in items[:2]], None, False, 1
    )
    assert list(pack_all([gone], 1, lambda _: None)) == [packed]
    done_path(first.path).unlink()
    assert next(pack_all([gone], 1, lambda _: None)) == Packed(
        None, [], [(name, "No such file or directory") for name in ("0.jpg", "1.jpg")]
    )


@pytest.fixture
def photos_in_classes(tmp_path: Path, pictures: list[bytes]) -> Path:
    for i in range(12):
        path = tmp_path / "photos" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[i])
    return tmp_path / "photos"


def test_stopped_build_goes_on_and_ends_as_if_it_had_not_been(photos_in_classes: Path, tmp_path: Path) -> None:
    """It is killed while the third shard is in work; the images of the first two are gone when it goes on."""
    stop = (
        "import os, signal, sys\nfrom pipeline.cli import main\nfrom pipeline.data import packing\n"
        "true = packing.pack\ndef pack(job, advance):\n"
        "    if '000002' in job.path.name: os.kill(os.getpid(), signal.SIGTERM)\n    return true(job, advance)\n"
        "packing.pack = pack\nsys.exit(main(sys.argv[1:]))"
    )
    again = "import sys\nfrom pipeline.cli import main\nsys.exit(main(sys.argv[1:]))"
    words = ["shards", "build", str(photos_in_classes), str(tmp_path / "out"), "--per-shard", "4"]

    def run(command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", command, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    build(str(photos_in_classes), tmp_path / "whole", per_shard=4, progress=False)
    stopped = run(stop)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped: 2 complete shards are kept, the same command goes on from there" in stopped.stderr
    assert not (tmp_path / "out").exists()
    (partial_folder,) = tmp_path.glob(".out.*.partial")
    for number in range(2):
        done = json.loads((partial_folder / f".train-{number:06d}.json").read_text())
        for _, name in done["sources"]:
            (photos_in_classes / name).write_bytes(b"spoiled")
    assert run(again).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


def test_other_images_are_not_mixed_with_those_of_a_stopped_build(photos_in_classes: Path, tmp_path: Path) -> None:
    from pipeline.data.shards import _forget_other_images

    folder = tmp_path / "out"
    folder.mkdir()
    items = [Item(name, partial(load, str(tmp_path), 0)) for name in "abc"]
    _forget_other_images(folder, {"train": items})
    (folder / ".train-000000.json").write_text("{}")
    _forget_other_images(folder, {"train": items})
    assert (folder / ".train-000000.json").exists()
    _forget_other_images(folder, {"train": items[::-1]})
    assert not (folder / ".train-000000.json").exists()


def test_shard_without_a_usable_image_leaves_no_gap(tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"no" if i < 3 else pictures[i])
    report = build(str(tmp_path / "photos"), tmp_path / "out", per_shard=1, progress=False)
    assert [entry.name for entry in report.shards["train"]] == [f"train-{i:06d}.tar" for i in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"train-{i:06d}.tar" for i in range(3)]
    for i in range(3):
        indexes.read_index(tmp_path / "out" / f"train-{i:06d}.tar")


def test_caption_beside_an_image_is_packed_with_it(tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "photos").mkdir()
    for name, data in (("a.jpg", pictures[0]), ("a.txt", b"a red hat"), ("b.jpg", pictures[1]), ("c.txt", b"no image")):
        (tmp_path / "photos" / name).write_bytes(data)
    report = build(str(tmp_path / "photos"), tmp_path / "out", progress=False)
    assert report.ignored == ["c.txt"]
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        texts = [tar.extractfile(member).read() for member in tar if member.name.endswith(".txt")]  # type: ignore[union-attr]
    assert texts == [b"a red hat"]
