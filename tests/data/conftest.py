"""Pictures and small shards for the tests of the data pipeline."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def untraced() -> None:
    """DALI need not note where in the code each operator was asked for: half of what making a graph takes."""
    from nvidia.dali._utils import dali_trace

    dali_trace.set_tracing(enabled=False)


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """Encode a Pillow image: `encoded(image, "PNG", **options)`."""

    def encode(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format_, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def pictures(photos: Path) -> list[bytes]:
    """32 JPEG files of photographs."""
    with tarfile.open(photos / "train-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:32]
        return [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar without an index: `make_shard({"a.jpg": data, "a.cls": b"3"}, "train-000000.tar")`."""

    def make(files: Mapping[str, bytes], name: str = "train-000000.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture(scope="session")
def spoil() -> Callable[[bytes], bytes]:
    """Break the Huffman tables of a JPEG: its header reads well and its end is there, but nothing decodes it."""

    def break_tables(jpeg: bytes) -> bytes:
        table = jpeg.find(b"\xff\xc4")
        return jpeg[: table + 5] + b"\xff" * 16 + jpeg[table + 21 :]

    return break_tables
