import gzip
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.data import archives, tars
from pipeline.data.images import EXTENSIONS
from pipeline.data.reader import Dataset
from pipeline.data.shards import build
from pipeline.errors import UserError


def packed(folder: Path) -> dict[bytes, tuple[int | None, dict[str, bytes]]]:
    """Label and further members of every image."""
    shard = folder / "train-000000.tar"
    data, dataset = shard.read_bytes(), Dataset(str(shard))
    rest = [
        {m.extension: data[m.offset : m.offset + m.size] for m in s.members if m.extension not in ("jpg", "cls")}
        for s in tars.walk(shard)
    ]
    return {bytes(dataset.image(r)): (dataset.label(r), rest[r]) for r in range(len(dataset))}


@pytest.mark.parametrize("end", [".tar.gz", ".tar"])
def test_archive_becomes_shards_with_all_that_belongs_to_its_images(
    end: str, make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    files = {
        "a.jpg": pictures[0],
        "a.cls": b"7",
        "a.txt": b"a hat",
        "b.jpg": pictures[1],
        "b.cls": b"1",
        "c.gif": b"no",
    }
    plain = make_shard(files, "set.tar")
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(8)))
    source = tmp_path / f"set{end}"
    source.write_bytes(gzip.compress(plain.read_bytes()) if end == ".tar.gz" else plain.read_bytes())
    report = build(str(source), tmp_path / "out", progress=False)
    assert packed(tmp_path / "out") == {pictures[0]: (7, {"txt": b"a hat"}), pictures[1]: (1, {})}
    assert report.classes == list("01234567")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []


def test_folders_in_an_archive_are_classes(
    make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    make_shard({"dog/1.jpg": pictures[0], "./cat/1.jpg": pictures[1]}, "set.tar")
    report = build(str(tmp_path / "set.tar"), tmp_path / "out", progress=False)
    assert report.classes == ["cat", "dog"]
    assert {data: label for data, (label, _) in packed(tmp_path / "out").items()} == {pictures[0]: 1, pictures[1]: 0}


def test_damaged_archive_is_refused_by_name(
    make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    data = gzip.compress(make_shard({"a.jpg": pictures[0]}, "set.tar").read_bytes())
    (tmp_path / "cut.tar.gz").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"the archive is damaged.*cut\.tar\.gz"):
        build(str(tmp_path / "cut.tar.gz"), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"no such file.*gone"):
        build(str(tmp_path / "gone-{0..1}.tar"), tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_table_gives_images_labels_captions_and_names(pictures: list[bytes], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": pictures[0], "path": "x"}, {"bytes": pictures[1], "path": None}, None]
    table = pyarrow.table({"image": images, "label": [1, 0, 1], "caption": ["hat", None, "lost"]})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "set.parquet")
    report = build(str(tmp_path / "set.parquet"), tmp_path / "out", progress=False)
    assert packed(tmp_path / "out") == {pictures[0]: (1, {"txt": b"hat"}), pictures[1]: (0, {})}
    assert report.classes == ["cat", "dog"]


def test_what_an_archive_holds_and_is_not_packed_is_named(
    make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    files = {"a.jpg": pictures[0], "a.cls": b"cat", "a.b.jpg": pictures[2], "b.gif": b"no", "bare": pictures[1]}
    make_shard(files, "set.tar")
    report = build(str(tmp_path / "set.tar"), tmp_path / "out", progress=False)
    assert packed(tmp_path / "out") == {pictures[0]: (None, {})}
    assert report.ignored == [
        "bare (no extension)",
        f"a.b.jpg ({tars.OTHER})",
        "a.cls (label is no number)",
        f"b (.gif, none of {', '.join(EXTENSIONS)})",
    ]


def test_rows_without_a_picture_or_a_number_are_named(pictures: list[bytes], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"image": [pictures[0], None, pictures[1]], "label": ["7", "1", "cat"]})
    parquet.write_table(table, tmp_path / "set.parquet")
    report = build(str(tmp_path / "set.parquet"), tmp_path / "out", progress=False)
    assert packed(tmp_path / "out") == {pictures[0]: (7, {}), pictures[1]: (None, {})}
    assert report.left_out == [("000000001.jpg", "empty")]
    assert report.ignored == ["000000002.cls (label is no number)"]


def test_damage_is_said_of_the_source_and_not_of_the_destination(pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.tar.bz2").write_bytes(b"no bzip2")  # an OSError of the module's own
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 40)  # a zlib.error
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"no tar"))
    for name, what in {"a.tar.bz2": "is damaged", "b.tar.gz": "is damaged", "c.tar.gz": "not a tar"}.items():
        with pytest.raises(UserError, match=what) as caught:
            build(str(tmp_path / name), tmp_path / "out", progress=False)
        assert caught.value.where == str(tmp_path / name)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "set.parquet")
    data = bytearray((tmp_path / "set.parquet").read_bytes())
    data[20:200] = bytes(180)
    (tmp_path / "set.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"the table is damaged.*set\.parquet"):
        build(str(tmp_path / "set.parquet"), tmp_path / "out", progress=False)


def test_archives_whose_labels_mean_other_classes_are_not_mixed(
    make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    for number, names in enumerate(("cat\ndog\n", "dog\ncat\n")):
        folder = tmp_path / f"set{number}"
        folder.mkdir()
        (folder / "classes.txt").write_text(names)
        make_shard({"a.jpg": pictures[number], "a.cls": b"0"}, f"set{number}/a.tar")
    with pytest.raises(UserError, match=r"its classes are not those of .*set0.*set1/classes\.txt"):
        build(str(tmp_path / "set{0..1}" / "a.tar"), tmp_path / "out", progress=False)


def test_table_without_pyarrow_or_images_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.parquet").write_bytes(b"no table")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(UserError, match=r"tables need pyarrow.*pip install 'poa-pretrain\[parquet\]'"):
            build(str(tmp_path / "set.parquet"), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="the table cannot be read"):
        build(str(tmp_path / "set.parquet"), tmp_path / "out", progress=False)


@pytest.fixture
def server(pictures: list[bytes]) -> Iterator[str]:
    """`/N` gives picture N; 9 ends early, 10 fails once, others are not there."""
    failed: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = int(self.path.partition("?")[0][1:])
            if number > 10 or (number == 10 and not failed):
                failed.append(self.path)
                self.send_error(404 if number > 10 else 503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(pictures[number])))
            self.end_headers()
            self.wfile.write(pictures[number][: -50 if number == 9 else None])

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_list_of_addresses_is_fetched_and_dead_ones_cost_their_own_sample(
    server: str, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives.time, "sleep", lambda _: None)
    lines = [
        "# list",
        f" {server}/1?key=secret\t3\ta hat",
        f"{server}/2\t0\tone\u2028line",
        "",
        f"{server}/9",
        f"{server}/10\tcat",
        f"{server}/77",
    ]
    (tmp_path / "urls.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    report = build(str(tmp_path / "urls.txt"), tmp_path / "out", progress=False)
    found = packed(tmp_path / "out")
    with_captions = {pictures[1]: (3, {"txt": b"a hat"}), pictures[2]: (0, {"txt": "one\u2028line".encode()})}
    assert found == {**with_captions, pictures[10]: (None, {})}
    assert report.ignored == [f"{tmp_path / 'urls.txt'}:6 (label is no number)"]
    assert sorted(report.left_out) == [(f"{server}/77", "http 404"), (f"{server}/9", "short")]
    assert "secret" not in (tmp_path / "out" / "sources.tsv").read_text()
    (tmp_path / "urls.txt").write_text("photo.jpg\n")
    with pytest.raises(UserError, match=r"not a web address.*urls\.txt:1"):
        build(str(tmp_path / "urls.txt"), tmp_path / "two", progress=False)
