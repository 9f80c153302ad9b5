import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import tars
from pipeline.data.images import BadImage, decode, hide_exif, inspect, open_image

LIMIT = 178956970
PICTURE = Image.fromarray((np.arange(20 * 30 * 3).reshape(20, 30, 3) % 251).astype(np.uint8))
EVERY_FORMAT = pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@EVERY_FORMAT
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_as_pillow_does(format_: str, orientation: int, encoded: Callable[..., bytes]) -> None:
    data = encoded(PICTURE, format_, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert inspect(data, LIMIT).size == upright.size[::-1]
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


@EVERY_FORMAT
def test_hidden_exif_is_not_seen_and_costs_no_pixel(format_: str, encoded: Callable[..., bytes]) -> None:
    data = bytearray(encoded(PICTURE, format_, exif=exif(6)))
    before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    header = inspect(data, LIMIT)
    hide_exif(data, header)
    image = Image.open(io.BytesIO(data))
    assert not image.getexif()
    assert np.array_equal(np.asarray(image.convert("RGB")), before)
    assert (inspect(data, LIMIT).orientation, header.orientation) == (1, 6)


def test_hidden_png_chunk_keeps_a_right_checksum(encoded: Callable[..., bytes]) -> None:
    data = bytearray(encoded(PICTURE, "PNG", exif=exif(3)))
    hide_exif(data, inspect(data, LIMIT))
    at = data.find(b"noNe")
    (length,) = struct.unpack_from(">I", data, at - 4)
    assert struct.unpack_from(">I", data, at + 4 + length)[0] == zlib.crc32(data[at : at + 4 + length])


@pytest.mark.parametrize("tiff", [b"", b"II", b"XX*\0\0\0\0\x08", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"])
@EVERY_FORMAT
def test_senseless_exif_means_upright(tiff: bytes, format_: str, encoded: Callable[..., bytes]) -> None:
    data = encoded(PICTURE, format_, exif=b"Exif\0\0" + tiff if format_ != "WEBP" else tiff or b"\0")
    assert inspect(data, LIMIT).size == (20, 30)


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_lossless_colours_survive(format_: str, encoded: Callable[..., bytes]) -> None:
    data = encoded(PICTURE, format_, **({"lossless": True} if format_ == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(PICTURE))


def test_sixteen_bits_keep_their_high_byte(encoded: Callable[..., bytes]) -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values))))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_reasons_of_rejection(encoded: Callable[..., bytes]) -> None:
    jpeg, png = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG")
    frame = jpeg.find(b"\xff\xc0")
    cases = {
        "empty": b"",
        "format": b"<html>404</html>",
        "header": jpeg[:10],
        "precision": jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
        "truncated": jpeg[: len(jpeg) * 9 // 10],
    }
    cases |= {"huge": jpeg[: frame + 5] + struct.pack(">HH", 60000, 60000) + jpeg[frame + 9 :]}
    for reason, data in cases.items():
        with pytest.raises(BadImage, match=f"^{reason}$"):
            inspect(data, LIMIT)
    for data, reason in ((png[:-20], "truncated"), (encoded(PICTURE, "WEBP")[:-9], "truncated")):
        with pytest.raises(BadImage, match=reason):
            inspect(data, LIMIT)
    no_height = jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]
    with pytest.raises(BadImage, match="header"):
        inspect(no_height, LIMIT)
    inspect(jpeg, 600)
    with pytest.raises(BadImage, match="huge"):
        inspect(jpeg, 599)


def test_end_marker_of_a_thumbnail_is_not_the_end(encoded: Callable[..., bytes]) -> None:
    jpeg = encoded(PICTURE, "JPEG")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(jpeg)) + jpeg
    with pytest.raises(BadImage, match="truncated"):
        inspect(jpeg[:2] + thumbnail + jpeg[2:-2], LIMIT)
    inspect(jpeg[:2] + thumbnail + jpeg[2:], LIMIT)


def test_junk_behind_the_end_is_harmless(encoded: Callable[..., bytes]) -> None:
    for format_ in ("JPEG", "PNG", "WEBP"):
        assert inspect(encoded(PICTURE, format_) + b"\xff\xd8junk" * 10000, LIMIT).size == (20, 30)


def test_damage_never_raises_anything_else(pictures: list[bytes], encoded: Callable[..., bytes]) -> None:
    generator = np.random.default_rng(0)
    originals = [pictures[0], *(encoded(PICTURE, format_, exif=exif(6)) for format_ in ("JPEG", "PNG", "WEBP"))]
    rejected = 0
    for _ in range(3000):
        data = bytearray(originals[generator.integers(len(originals))])
        for _ in range(generator.integers(1, 5)):
            data[generator.integers(min(len(data), 300))] = generator.integers(256)
        try:
            header = inspect(data, LIMIT)
            hide_exif(data, header)
        except BadImage:
            rejected += 1
    assert 100 < rejected < 2900


def test_awkward_images_are_judged_as_they_should_be(odd: Path) -> None:
    expected = {image["key"]: image for image in json.loads((odd / "odd.json").read_text())["images"]}
    shard = odd / "images-000000.tar"
    seen = 0
    with open(shard, "rb") as file:
        for sample in tars.walk(shard):
            assert sample.image
            file.seek(sample.image.offset)
            data = file.read(sample.image.size)
            try:
                size = inspect(data, LIMIT).size
                decoded = decode(data).size == size[::-1]
            except BadImage:
                decoded = False
            image = expected[sample.key]
            if image["strict"]:
                assert decoded == (image["should"] == "decode"), image["what"]
                seen += 1
    assert seen == sum(image["strict"] for image in expected.values()) > 30


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EndProlog\n9 9 moveto showpage\n%%EOF\n"


def test_postscript_never_reaches_ghostscript_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\necho started >> {tmp_path / 'proof'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(BadImage, match="format"):
        decode(EPS)
    with pytest.raises(BadImage, match="format"):
        decode(struct.pack("<4sIIIIIIHH", b"\xc5\xd0\xd3\xc6", 32, len(EPS), 0, 0, 0, 0, 0, 0) + EPS)  # in DOS' wrapper
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("format_", ["PSD", "PDF", "SGI", "PCX", "XBM", "DDS", "IM", "MSP", "SPIDER", "PALM"])
def test_only_formats_that_are_meant_are_opened(format_: str, encoded: Callable[..., bytes]) -> None:
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F", "PALM": "L"}.get(format_, "RGB")
    try:
        data = encoded(PICTURE.convert(mode), format_)
    except (KeyError, OSError):
        data = b"8BPS\0\1" + bytes(40)
    with pytest.raises(BadImage, match="format"):
        open_image(data)


RAMP = np.arange(256, dtype=np.int64)[None].repeat(4, 0)  # every level once in a row


def tiff(pixels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of one grey strip; 12-bit samples are packed two in three bytes."""
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(int)
        body = bytes(b for x, y in pairs for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))
    else:
        body = pixels.astype(
            {(16, 1): "<u2", (16, 2): "<i2", (32, 1): "<u4", (32, 3): "<f4"}[bits, sample_format]
        ).tobytes()
    tags = [
        (256, 4, pixels.shape[1]),
        (257, 4, pixels.shape[0]),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8 + 2 + 12 * 10 + 4),
        (277, 3, 1),
        (278, 4, pixels.shape[0]),
        (279, 4, len(body)),
        (339, 3, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + body


def test_deep_greys_keep_their_high_bits(encoded: Callable[..., bytes]) -> None:
    deep = (RAMP * 257).astype(np.uint16)
    for data in (
        tiff(RAMP * 257, 16),
        tiff(RAMP << 4, 12),
        encoded(Image.fromarray(deep)),
        b"P5 256 4 65535\n" + deep.astype(">u2").tobytes(),
        b"P5 256 4 4095\n" + np.rint(RAMP * 4095 / 255).astype(">u2").tobytes(),
    ):
        assert np.array_equal(np.asarray(decode(data))[..., 0], RAMP)
    assert np.array_equal(np.asarray(decode(tiff(RAMP * 257, 16, photometric=0)))[..., 1], 255 - RAMP)


def test_samples_without_a_known_range_are_named_and_not_made_black_or_white(encoded: Callable[..., bytes]) -> None:
    for data in (
        tiff(RAMP / 255, 32, sample_format=3),
        tiff(RAMP * 255.0, 32, sample_format=3),
        tiff(RAMP * 1e9, 32, sample_format=3),
        tiff(RAMP << 20, 32),
        tiff(RAMP << 24, 32),
        tiff(RAMP * 100 - 9000, 16, sample_format=2),
        tiff(RAMP, 16),  # eight bits in sixteen, four bits short of a picture
        tiff(RAMP << 3, 16),
        encoded(Image.fromarray((RAMP << 3).astype(np.uint16))),
        b"Pf 256 4 -1.0\n" + (RAMP / 255).astype("<f4").tobytes(),
    ):
        with pytest.raises(BadImage, match="precision"):
            decode(data)
    assert not np.asarray(decode(tiff(RAMP * 0, 16))).any(), "black is a picture"


def test_picture_with_too_many_pixels_is_huge_and_not_damaged() -> None:
    """20000 x 10000 pixels of one bit: sound, in a quarter of a megabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(2501) * 10000)
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="huge"):
        decode(png)
    gif = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
    with pytest.raises(BadImage, match="huge"):
        decode(gif + b"\x02\x02\x4c\x01\0;")
