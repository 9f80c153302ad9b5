"""What can be told of an encoded image without decoding it, and the one rule of decoding: RGB, 8 bit, upright."""

import io
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length
_ORIENTATION_TAG = 0x0112


class BadImage(ValueError):  # noqa: N818  named for what it is
    """An image that cannot be used. `reason` is one word, fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """Format and size in pixels, after the EXIF orientation is applied."""

    format: str
    height: int
    width: int


class _Parsed(NamedTuple):
    format: str
    height: int
    width: int
    orientation: int
    complete: bool


def inspect(data: bytes, max_pixels: int) -> Header:
    """Read the header of a JPEG, PNG, WebP or BMP and look for its end; a few microseconds.

    Damage inside the pixel data passes: only decoding finds that.

    Raises:
        BadImage: reason `empty`, `format` (none of the four), `header` (unreadable), `precision` (not 8-bit JPEG),
            `huge` (more than `max_pixels`) or `truncated`.
    """
    if not data:
        raise BadImage("empty")
    try:
        parsed = _parser(data)(data)
    except (struct.error, IndexError) as error:
        raise BadImage("header") from error
    if parsed.height < 1 or parsed.width < 1:
        raise BadImage("header")
    if parsed.height * parsed.width > max_pixels:
        raise BadImage("huge")
    if not parsed.complete:
        raise BadImage("truncated")
    turned = parsed.orientation >= 5  # 5..8 swap the axes
    height, width = (parsed.width, parsed.height) if turned else (parsed.height, parsed.width)
    return Header(parsed.format, height, width)


def decode(data: bytes) -> "Image.Image":
    """Decode fully with Pillow to upright 8-bit RGB: what training sees, for evaluation and checks.

    Transparency is dropped, 16-bit samples keep their high byte and of an animation the first frame is taken.

    Raises:
        BadImage: reason `decode`.
    """
    from PIL import Image, ImageOps

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
        raise BadImage("decode") from error


def undecodable(encoded: Sequence[np.ndarray | bytes]) -> list[int]:
    """Which of these encoded images the decoder behind the data pipeline gives up on (its CPU back ends)."""
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
    )
    return [i for i, data in enumerate(encoded) if _decoded(decoder, data) is None]


def _decoded(decoder: Any, data: np.ndarray | bytes) -> Any:
    try:
        return decoder.decode(data)
    except RuntimeError:  # not even the header was understood
        return None


def _parser(data: bytes) -> Any:
    if data[:2] == b"\xff\xd8":
        return _parse_jpeg
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _parse_png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _parse_webp
    if data[:2] == b"BM":
        return _parse_bmp
    raise BadImage("format")


def _parse_jpeg(data: bytes) -> _Parsed:
    height = width = 0
    orientation, position = 1, 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _JPEG_BARE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:  # start of scan; trailing junk behind the end marker is harmless
            return _Parsed("jpeg", height, width, orientation, data.find(b"\xff\xd9", position) >= 0)
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in _JPEG_FRAMES:
            precision, height, width = struct.unpack_from(">BHH", data, position + 4)
            if precision != 8:
                raise BadImage("precision")
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    raise BadImage("header")


def _parse_png(data: bytes) -> _Parsed:
    width, height = struct.unpack_from(">II", data, 16)
    if data[12:16] != b"IHDR":
        raise BadImage("header")
    orientation, position = 1, 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return _Parsed("png", height, width, orientation, True)
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        position += 12 + length
    return _Parsed("png", height, width, orientation, False)


def _parse_webp(data: bytes) -> _Parsed:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    else:
        raise BadImage("header")
    (riff_size,) = struct.unpack_from("<I", data, 4)
    orientation = _webp_orientation(data) if kind == b"VP8X" else 1
    return _Parsed("webp", height, width, orientation, riff_size + 8 <= len(data))


def _webp_orientation(data: bytes) -> int:
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            return _exif_orientation(data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    return 1


def _parse_bmp(data: bytes) -> _Parsed:
    pixels_at, header_size = struct.unpack_from("<II", data, 10)
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<ii", data, 18)
    return _Parsed("bmp", abs(height), width, 1, len(data) > pixels_at)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation tag of the first directory, 1 (upright) if there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, _type, _count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # offsets that point outside
        pass
    return 1
