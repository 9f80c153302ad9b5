"""Awkward members of shards as they turn up in the wild, each with what a robust reader does with it.

`should` is `decode` (the picture is delivered) or `skip` (left out and counted); where `strict` is false the other
outcome is tolerable. Either way nothing crashes, hangs or shifts the labels of others.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scenes import encode, render, write_tar

SHARD = "images-000000.tar"


class Awkward(NamedTuple):
    what: str
    data: bytes
    should: str
    strict: bool = True


def write_awkward(directory: Path) -> None:
    """Write the shard, members `KEY.jpg` and `KEY.cls`, and `odd.json`, which says what each is."""
    images = list(everything())
    write_tar(directory / SHARD, _members(images))
    keys = ("key", "label", "what", "should", "strict")
    rows = [
        dict(zip(keys, (f"odd_{i:03d}", i % 10, image.what, image.should, image.strict), strict=True))
        for i, image in enumerate(images)
    ]
    (directory / "odd.json").write_text(json.dumps({"images": rows}, indent=1))


def _members(images: list[Awkward]) -> Iterator[tuple[str, bytes]]:
    for i, image in enumerate(images):
        yield f"odd_{i:03d}.jpg", image.data
        yield f"odd_{i:03d}.cls", str(i % 10).encode()


def everything() -> Iterator[Awkward]:
    """All kinds; controls between them would show a shift of labels or a batch that lost a neighbour."""
    for kind in (cut_short, no_images, damaged, bombs, other_modes, other_formats, shapes, wrapped):
        yield Awkward("ordinary JPEG (control)", encode(picture()), "decode")
        yield from kind()


def picture(width: int = 120, height: int = 160) -> Image.Image:
    return render(7, 4, (width, height))


def segment(jpeg: bytes, marker: int) -> int:
    """Offset of a JPEG's first segment of a kind."""
    at = 2
    while jpeg[at + 1] != marker:
        at += 2 + struct.unpack_from(">H", jpeg, at + 2)[0]
    return at


def scan(jpeg: bytes) -> int:
    """Offset of a JPEG's first pixel data."""
    at = segment(jpeg, 0xDA)
    return at + 2 + struct.unpack_from(">H", jpeg, at + 2)[0]


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def frame_size(jpeg: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its header."""
    at = segment(jpeg, 0xC0)
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def cut_short() -> Iterator[Awkward]:
    jpeg, png, webp = encode(picture()), encode(picture(), "PNG"), encode(picture(), "WEBP")
    pixels = scan(jpeg)
    yield Awkward("JPEG cut after 10 bytes", jpeg[:10], "skip")
    yield Awkward("JPEG cut inside its tables", jpeg[: segment(jpeg, 0xDA) - 30], "skip")
    yield Awkward("JPEG without pixel data", jpeg[:pixels], "skip")
    for percent in (10, 50, 90):
        part = jpeg[: pixels + (len(jpeg) - pixels) * percent // 100]
        yield Awkward(f"JPEG with {percent}% of its pixel data", part, "skip", percent == 10)
    yield Awkward("JPEG without its end marker", jpeg[:-2], "decode", False)
    yield Awkward("JPEG whose second half was never written: zeros", jpeg[:pixels].ljust(len(jpeg), b"\0"), "skip")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8))
    yield Awkward("JPEG of noise, cut", encode(noise)[:6000], "skip", False)
    yield Awkward("large JPEG cut after 16 KB", encode(picture(1100, 900))[:16384], "skip", False)
    yield Awkward("progressive JPEG, first half", _half(encode(picture(), progressive=True)), "skip", False)
    yield Awkward("PNG, first half", _half(png), "skip", False)
    yield Awkward("WebP, first half", _half(webp), "skip", False)


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def no_images() -> Iterator[Awkward]:
    yield Awkward("empty file", b"", "skip")
    yield Awkward("text", b"the picture that was here has moved\n" * 4, "skip")
    yield Awkward("HTML page of an error", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "skip")
    yield Awkward("4 KiB of zeros", bytes(4096), "skip")
    junk = np.random.default_rng(1).integers(0, 256, 3000, np.uint8).tobytes()
    yield Awkward("JPEG's first bytes, then random ones", b"\xff\xd8\xff\xe0" + junk, "skip")


def damaged() -> Iterator[Awkward]:
    jpeg = encode(picture())
    generator, spoilt = np.random.default_rng(2), bytearray(jpeg)
    for at in generator.integers(scan(jpeg) + 200, len(jpeg) - 2, 60):
        spoilt[at] = generator.integers(0xFF)
    yield Awkward("JPEG with 60 damaged bytes among its pixels", bytes(spoilt), "skip", False)
    bare = jpeg
    while b"\xff\xc4" in bare:
        at = segment(bare, 0xC4)
        bare = bare[:at] + bare[at + 2 + struct.unpack_from(">H", bare, at + 2)[0] :]
    yield Awkward("JPEG without Huffman tables, as in films", bare, "skip", False)
    at = segment(jpeg, 0xC0)
    yield Awkward("JPEG that announces 12 bits", jpeg[: at + 4] + b"\x0c" + jpeg[at + 5 :], "skip")
    yield Awkward("JPEG that announces no rows", frame_size(jpeg, 0, 120), "skip")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    yield Awkward(
        "PNG with a senseless chunk", b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\x08\xf4\xf5\xf6\xf7" * 4, "skip"
    )


def bombs() -> Iterator[Awkward]:
    """Small files that announce gigabytes: to be refused from the header."""
    yield Awkward("JPEG that announces 60000 x 60000", frame_size(encode(picture()), 60000, 60000), "skip")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    yield Awkward("PNG that announces 60000 x 60000", b"\x89PNG\r\n\x1a\n" + header + end, "skip")
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    gif += b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0\x3b"
    yield Awkward("GIF that announces 65535 x 65535", gif, "skip")
    png = encode(picture(8, 8), "PNG")
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(4 << 20)))
    yield Awkward("PNG whose text is a bomb", png[:33] + text + png[33:], "skip", False)


def other_modes() -> Iterator[Awkward]:
    """Colours that are not three times eight bits."""
    image = picture()
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    high = np.asarray(image.convert("L")).astype(np.uint16) << 8
    yield Awkward("PNG", encode(image, "PNG"), "decode")
    yield Awkward("PNG with alpha", encode(alpha, "PNG"), "decode")
    yield Awkward("grey PNG with alpha", encode(alpha.convert("LA"), "PNG"), "decode")
    yield Awkward("grey PNG of 16 bits", encode(Image.fromarray(high), "PNG"), "decode", False)
    yield Awkward("palette PNG", encode(image.quantize(64), "PNG"), "decode")
    yield Awkward("palette PNG with a transparent colour", encode(image.quantize(64), "PNG", transparency=3), "decode")
    yield Awkward("PNG of 1 bit", encode(image.convert("1"), "PNG"), "decode", False)
    yield Awkward("CMYK JPEG", encode(image.convert("CMYK")), "decode")
    yield Awkward("grey JPEG", encode(image.convert("L")), "decode")


def other_formats() -> Iterator[Awkward]:
    image, next_image = picture(), render(8, 4, (120, 160))
    alpha = image.copy()
    alpha.putalpha(128)
    frames = {"save_all": True, "append_images": [next_image], "duration": 100}
    yield Awkward("WebP", encode(image, "WEBP"), "decode", False)
    yield Awkward("WebP with alpha", encode(alpha, "WEBP"), "decode", False)
    yield Awkward("lossless WebP", encode(image, "WEBP", lossless=True), "decode", False)
    yield Awkward("moving GIF", encode(image, "GIF", **frames), "decode", False)
    yield Awkward("BMP", encode(picture(60, 44), "BMP"), "decode", False)
    yield Awkward("progressive JPEG", encode(image, progressive=True), "decode")
    yield Awkward("JPEG 4:4:4 with restart markers", encode(image, subsampling=0, restart_marker_rows=1), "decode")


def shapes() -> Iterator[Awkward]:
    """Sizes and orientations."""
    yield Awkward("grey JPEG of 1 x 1", encode(Image.new("L", (1, 1))), "decode", False)
    yield Awkward("JPEG of 1 x 1", encode(Image.new("RGB", (1, 1), (200, 30, 30))), "decode", False)
    yield Awkward("JPEG of 1000 x 8", encode(picture(1000, 8)), "decode")
    yield Awkward("JPEG of 8 x 1000", encode(picture(8, 1000)), "decode")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Awkward(f"JPEG with EXIF orientation {orientation}", encode(picture(), exif=exif), "decode")


def wrapped() -> Iterator[Awkward]:
    """A sound picture with something unusual around it."""
    jpeg = encode(picture())
    broken = b"Exif\0\0MM\0*\xff\xff\xff\xf0\0\0"
    profile = encode(picture(), icc_profile=bytes(range(256)) * 240)
    yield Awkward("JPEG with 60 KB of profile and 40 KB of junk behind", profile + b"\xff\xd8junk" * 6667, "decode")
    yield Awkward("JPEG with senseless EXIF", encode(picture(), exif=broken), "decode")
    yield Awkward("JPEG with FF00 after its first marker", jpeg[:2] + b"\xff\0" + jpeg[2:], "decode", False)
    yield Awkward("two JPEGs in one file", jpeg + encode(render(8, 4)), "decode")
    thumbnail = io.BytesIO()
    picture(16, 16).save(thumbnail, "JPEG")
    inner = b"Exif\0\0" + thumbnail.getvalue()
    yield Awkward(
        "JPEG with a thumbnail", jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(inner)) + inner + jpeg[2:], "decode"
    )
