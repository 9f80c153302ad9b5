"""Segmentation masks beside images: one class index per pixel, 255 where there is none to be told."""

import io
from pathlib import Path

import numpy as np

from pipeline.data.encode import shrunk
from pipeline.data.images import BadImage, open_image

MASK = "seg.png"
"""Extension of a sample's mask in a shard: an 8-bit grey PNG of the upright image's size."""
_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # without loss


def read_mask(folder: Path, image: Path) -> bytes:
    """The file that has the image's path below the folder of masks, but for its suffix.

    Raises:
        BadImage: there is none.
        OSError: it cannot be read.
    """
    for suffix in _SUFFIXES:
        try:
            return (folder / image.with_suffix(suffix)).read_bytes()
        except FileNotFoundError:
            continue
    raise BadImage("no mask")


def encode_mask(content: bytes, size: tuple[int, int], shorter_side: int | None) -> bytes:
    """A mask as it is packed; a palette's numbers are the class indices, whatever its colours.

    Args:
        content: a file without loss, of one channel.
        size: width and height of the packed image, upright.
        shorter_side: to which images were shrunk; the mask follows without mixing classes.

    Raises:
        BadImage: reason `mask colours` (no class indices), `mask values` (beyond 255), `mask size` (another than the
            image's) or one of `images.open_image`.
    """
    from PIL import Image

    opened = open_image(content)
    try:
        pixels = np.asarray(opened)
    except Exception as error:
        raise BadImage("decode") from error
    if pixels.ndim != 2 or opened.mode == "F":
        raise BadImage("mask colours")
    if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise BadImage("mask values")
    mask = Image.fromarray(pixels.astype(np.uint8))
    if shrunk(mask.size, shorter_side) != size:
        raise BadImage("mask size")
    file = io.BytesIO()
    (mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)).save(file, "png")
    return file.getvalue()
