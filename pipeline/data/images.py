"""What can be told of an encoded image without decoding it, and the one rule of decoding: RGB, 8 bit, upright.

The EXIF orientation is read here, for training and evaluation alike, and hidden from DALI's decoder: that one reads it
in another way where it is malformed, and has been seen to crash on offsets that point outside the block.
"""

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""What Pillow may take bytes for; the first three are what 8-bit RGB training reads of shards."""
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length
_PNG_PLAIN = (b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = 1
_WEBP_HAS_EXIF = 0x08


class BadImage(ValueError):  # noqa: N818  named for what it is
    """An image that cannot be used. `reason` is one word, fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """What the header of an image says.

    Attributes:
        format: `jpeg`, `png` or `webp`.
        rows, cols: size in pixels as stored.
        orientation: EXIF, 1..8; from 5 on rows and columns are swapped when the image is put upright.
        complete: the end of the image is there.
        exif_at: offset of each EXIF block's name.
        plain: stored as nearly all images are, so that no two decoders see different pictures in it.
    """

    format: str
    rows: int
    cols: int
    orientation: int
    complete: bool
    exif_at: tuple[int, ...]
    plain: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Upright height and width."""
        return (self.cols, self.rows) if self.orientation >= 5 else (self.rows, self.cols)


def inspect(data: bytes | bytearray, max_pixels: int) -> Header:
    """Read the header of a JPEG, PNG or WebP and look for its end; a few microseconds.

    Damage inside the pixel data passes: only decoding finds that.

    Raises:
        BadImage: reason `empty`, `format` (none of the three), `header` (unreadable), `precision` (not 8-bit JPEG),
            `huge` (more than `max_pixels`) or `truncated`.
    """
    if not data:
        raise BadImage("empty")
    try:
        header = _parser(data)(data)
    except (struct.error, IndexError) as error:
        raise BadImage("header") from error
    if header.rows < 1 or header.cols < 1:
        raise BadImage("header")
    if header.rows * header.cols > max_pixels:
        raise BadImage("huge")
    if not header.complete:
        raise BadImage("truncated")
    return header


def hide_exif(data: bytearray, header: Header) -> None:
    """Rename the EXIF blocks, in place, so that a decoder passes over them."""
    for at in header.exif_at:
        if header.format != "png":
            data[at : at + 4] = b"none"
            if header.format == "webp":
                data[20] &= ~_WEBP_HAS_EXIF
            continue
        (length,) = struct.unpack_from(">I", data, at - 4)
        data[at : at + 4] = b"noNe"  # ancillary, private, safe to copy
        struct.pack_into(">I", data, at + 4 + length, zlib.crc32(data[at : at + 4 + length]))


def open_image(data: bytes | bytearray) -> "Image.Image":
    """Open an encoded image with Pillow, as one of `FORMATS` and nothing else.

    Pillow alone would also try formats that start another program on the bytes (PostScript's Ghostscript), whatever
    the name of the file says.

    Raises:
        BadImage: reason `huge` (more pixels than Pillow takes), `format` or `decode`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("huge") from error
    except UnidentifiedImageError as error:
        raise BadImage("format") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
        raise BadImage("decode") from error


class Decoded(NamedTuple):
    """A picture as its file stores it, 8-bit RGB, and the EXIF orientation that puts it upright."""

    stored: "Image.Image"
    orientation: int

    def upright(self) -> "Image.Image":
        from PIL import Image

        turns = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }
        turn = turns.get(self.orientation)
        return self.stored if turn is None else self.stored.transpose(turn)


def decode(data: bytes | bytearray) -> "Image.Image":
    """Decode fully with Pillow to upright 8-bit RGB: what training sees, for evaluation and checks.

    Transparency is dropped, 16-bit samples keep their high byte and of an animation the first frame is taken.

    Raises:
        BadImage: see `decode_stored`.
    """
    return decode_stored(data).upright()


def decode_stored(data: bytes | bytearray) -> Decoded:
    """`decode`, but for the orientation.

    Raises:
        BadImage: reason `format`, `huge`, `precision` (see `rgb`) or `decode`.
    """
    from PIL import Image

    image = open_image(data)
    try:
        image.load()
        return Decoded(rgb(image), _orientation(image, data))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("huge") from error
    except Exception as error:
        raise BadImage("decode") from error


def rgb(image: "Image.Image") -> "Image.Image":
    """An image as 8-bit RGB, black staying black and white white.

    Raises:
        BadImage: reason `precision`: floats and integers of more than 16 bits have no known black and white, and of
            16 bits the upper four are empty, so that what is left would be nearly black.
    """
    from PIL import Image

    bits = _bits(image)
    if bits > 16:
        raise BadImage("precision")
    if bits > 8:
        samples = np.asarray(image)
        if 0 < samples.max() < 1 << (bits - 4):
            raise BadImage("precision")
        levels = (samples >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(~levels if _white_is_zero(image) else levels).convert("RGB")
    return image.convert("RGB")


def _bits(image: "Image.Image") -> int:
    """Bits of a sample's range; 32 stands for all that has no known range."""
    if image.mode.startswith("I;16"):
        return image.tag_v2.get(_TIFF_BITS, (16,))[0] if hasattr(image, "tag_v2") else 16
    if image.mode == "I":
        return 16 if image.format in ("PNG", "PPM") else 32  # Pillow stretches PPM's own range to 16 bits
    return 32 if image.mode == "F" else 8


def _white_is_zero(image: "Image.Image") -> bool:
    """Whether a deep TIFF is stored as a negative, which Pillow turns for 8 bits only."""
    return hasattr(image, "tag_v2") and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0


def _orientation(image: "Image.Image", data: bytes | bytearray) -> int:
    try:
        return _parser(data)(data).orientation
    except (BadImage, struct.error, IndexError):  # nothing that training reads
        return image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)


def _parser(data: bytes | bytearray) -> Any:
    if data[:2] == b"\xff\xd8":
        return _parse_jpeg
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _parse_png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _parse_webp
    raise BadImage("format")


def _parse_jpeg(data: bytes | bytearray) -> Header:
    rows = cols = 0
    exif_at: tuple[int, ...] = ()
    orientation, position = _UPRIGHT, 2
    colours, transform = b"", 1
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _JPEG_BARE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:  # start of scan; trailing junk behind the end marker is harmless
            plain = len(colours) == 1 or (colours == b"\1\2\3" and transform == 1)
            return Header("jpeg", rows, cols, orientation, data.find(b"\xff\xd9", position) >= 0, exif_at, plain)
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in _JPEG_FRAMES:
            precision, rows, cols = struct.unpack_from(">BHH", data, position + 4)
            if precision != 8:
                raise BadImage("precision")
            colours = bytes(data[position + 10 : position + 10 + 3 * data[position + 9] : 3])
        elif marker == 0xEE and data[position + 4 : position + 9] == b"Adobe":
            transform = data[position + 15]
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            if not exif_at:
                orientation = _exif_orientation(data[position + 10 : position + 2 + length])
            exif_at = (*exif_at, position + 4)
        position += 2 + length
    raise BadImage("header")


def _parse_png(data: bytes | bytearray) -> Header:
    cols, rows = struct.unpack_from(">II", data, 16)
    if data[12:16] != b"IHDR":
        raise BadImage("header")
    exif_at: tuple[int, ...] = ()
    orientation, position, complete = _UPRIGHT, 8, False
    plain = data[24] == 8 and data[25] in (0, 2)
    while position + 12 <= len(data) and not complete:
        length, kind = struct.unpack_from(">I4s", data, position)
        complete = kind == b"IEND"
        plain = plain and kind in _PNG_PLAIN
        if kind == b"eXIf" and position + 12 + length <= len(data):
            if not exif_at:
                orientation = _exif_orientation(data[position + 8 : position + 8 + length])
            exif_at = (*exif_at, position + 4)
        position += 12 + length
    return Header("png", rows, cols, orientation, complete, exif_at, plain)


def _parse_webp(data: bytes | bytearray) -> Header:
    kind = data[12:16]
    if kind == b"VP8 ":
        cols, rows = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        cols, rows = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        cols, rows = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    else:
        raise BadImage("header")
    (riff_size,) = struct.unpack_from("<I", data, 4)
    orientation, exif_at = _webp_exif(data)
    return Header("webp", rows, cols, orientation, riff_size + 8 <= len(data), exif_at)


def _webp_exif(data: bytes | bytearray) -> tuple[int, tuple[int, ...]]:
    exif_at: tuple[int, ...] = ()
    orientation, position = _UPRIGHT, 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            if not exif_at:
                block = data[position + 8 : position + 8 + length]
                orientation = _exif_orientation(block.removeprefix(b"Exif\0\0"))
            exif_at = (*exif_at, position)
        position += 8 + length + length % 2
    return orientation, exif_at


def _exif_orientation(tiff: bytes | bytearray) -> int:
    """The orientation in the first directory; upright if there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return _UPRIGHT
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, _type, _count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else _UPRIGHT
    except struct.error:  # offsets that point outside
        pass
    return _UPRIGHT
