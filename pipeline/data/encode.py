"""The bytes of an image in a shard: the original file where training can read it, else a new one."""

import io
import threading
from typing import TYPE_CHECKING, Any

from pipeline.data.images import BadImage, decode, inspect

if TYPE_CHECKING:
    from PIL import Image

_NO_LIMIT = 1 << 62  # pixels; what is too large for training is for the experiment to say
_LOSSY = ("jpeg", "webp")
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_local = threading.local()


def encode(content: "bytes | Image.Image", shorter_side: int | None = None) -> tuple[str, bytes]:
    """Extension and bytes under which an image is packed.

    Args:
        content: an encoded file of any format that Pillow knows, or an image without a file.
        shorter_side: shrink so that the shorter side has this many pixels; smaller images stay as they are.

    Raises:
        BadImage: it cannot be decoded in full.
    """
    if not isinstance(content, bytes):
        return "png", _as_file(_shrink(content, shorter_side), "png")
    try:
        image = decode(content)
    except BadImage:
        inspect(content, _NO_LIMIT)  # may know the reason better
        raise
    format_ = readable_format(content)
    if format_ and (shorter_side is None or min(image.size) <= shorter_side):
        return _EXTENSIONS[format_], content
    lossy = format_ in _LOSSY
    return ("jpg" if lossy else "png"), _as_file(_shrink(image, shorter_side), "jpeg" if lossy else "png")


def readable_format(data: bytes) -> str | None:
    """The format if the decoder of the training pipeline can read this file, else None."""
    try:
        header = inspect(data, _NO_LIMIT)
    except BadImage:
        return None
    return header.format if _decoder().decode(data) is not None else None


def _decoder() -> Any:
    """nvImageCodec's, which DALI's decoder is made of; one per thread."""
    if not hasattr(_local, "decoder"):
        from nvidia import nvimgcodec

        _local.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
    return _local.decoder


def _shrink(image: "Image.Image", shorter_side: int | None) -> "Image.Image":
    from PIL import Image

    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    scale = shorter_side / min(image.size)
    width, height = (max(round(side * scale), shorter_side) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _as_file(image: "Image.Image", format_: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **({"quality": 95} if format_ == "jpeg" else {}))
    return file.getvalue()
