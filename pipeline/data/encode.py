"""The bytes of an image in a shard: the original file where training can read it, else a new one."""

import io
from typing import TYPE_CHECKING

from pipeline.data.decoders import NO_LIMIT, plain_format, require_equal_pictures
from pipeline.data.images import BadImage, Decoded, decode_stored, inspect, rgb
from pipeline.data.values import decode_values, has_values, name_of

if TYPE_CHECKING:
    from PIL import Image

_LOSSY = ("jpeg", "webp")
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def encode(content: "bytes | Image.Image", shorter_side: int | None = None) -> tuple[str, bytes]:
    """Extension and bytes under which an image is packed.

    Args:
        content: an encoded file of one of `images.FORMATS`, or an image without a file.
        shorter_side: shrink so that the shorter side has this many pixels; smaller images stay as they are.

    Raises:
        BadImage: it cannot be decoded in full.
    """
    if not isinstance(content, bytes):
        image = content if content.mode in ("L", "RGB") else rgb(content)
        return "png", _as_file(_shrink(image, shorter_side), "png")
    if shorter_side is None and (plain := _plain_format(content)):
        return _EXTENSIONS[plain], content
    decoded = _decode(content)
    format_ = _readable_format(content, decoded)
    image = decoded.upright()
    if format_ and (shorter_side is None or min(image.size) <= shorter_side):
        return _EXTENSIONS[format_], content
    lossy = format_ in _LOSSY
    return ("jpg" if lossy else "png"), _as_file(_shrink(image, shorter_side), "jpeg" if lossy else "png")


def _plain_format(content: bytes) -> str | None:
    try:
        return plain_format(content)
    except BadImage:  # in another way it may be readable, or the reason a better one
        return None


def keep_values(content: "bytes | Image.Image") -> tuple[str, bytes]:
    """Extension and bytes of an image that is packed with the depth and the channels that it has.

    Raises:
        BadImage: it cannot be decoded so, see `values.decode_values`.
    """
    if not isinstance(content, bytes):
        return encode(content)
    decode_values(content, NO_LIMIT)
    return (name_of(content) if has_values(content) else _EXTENSIONS[inspect(content, NO_LIMIT).format]), content


def _decode(content: bytes) -> Decoded:
    try:
        return decode_stored(content)
    except BadImage as error:
        if error.reason in ("decode", "format"):
            _raise_better_reason(content)
        raise


def _raise_better_reason(content: bytes) -> None:
    """The header check may know why an image cannot be decoded."""
    try:
        inspect(content, NO_LIMIT)
    except BadImage as error:
        if error.reason != "format":  # one of its three
            raise


def _readable_format(content: bytes, decoded: Decoded) -> str | None:
    """The format if training's decoder reads the same picture from this file, else None."""
    try:
        return require_equal_pictures(content, decoded.stored).format
    except BadImage:
        return None


def _shrink(image: "Image.Image", shorter_side: int | None) -> "Image.Image":
    from PIL import Image

    size = shrunk(image.size, shorter_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """What becomes of a size when the shorter side must not have more pixels."""
    if shorter_side is None or min(size) <= shorter_side:
        return size
    scale = shorter_side / min(size)
    width, height = (max(round(side * scale), shorter_side) for side in size)
    return width, height


def _as_file(image: "Image.Image", format_: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **({"quality": 95} if format_ == "jpeg" else {}))
    return file.getvalue()
