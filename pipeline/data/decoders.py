"""Does training see what evaluation sees? Its decoder is held against Pillow's picture, once, when shards are made."""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images import BadImage, Header, decode_stored, hide_exif, inspect

if TYPE_CHECKING:
    from PIL import Image

NO_LIMIT = 1 << 62  # pixels; what is too large for training is for the experiment to say
_FAR, _FAR_SHARE, _MEAN = 16, 0.01, 2.0  # levels, share of values that may be so far apart, mean levels apart
_STRIP = 1 << 20  # values compared at once
_local = threading.local()


def require_equal_pictures(data: bytes, stored: "Image.Image") -> Header:
    """Hold what training's decoder makes of a file against what Pillow made of it.

    Args:
        data: JPEG, PNG or WebP.
        stored: from `images.decode_stored`.

    Returns:
        The file's header.

    Raises:
        BadImage: a reason of `images.inspect`, `decode` (training's decoder gives up) or `pixels` (another picture).
    """
    header = inspect(data, NO_LIMIT)
    hidden = bytearray(data)
    hide_exif(hidden, header)
    pixels = _decode(bytes(hidden))
    if pixels is None:
        raise BadImage("decode")
    if _differ(pixels, np.asarray(stored)):
        raise BadImage("pixels")
    return header


def plain_format(data: bytes) -> str | None:
    """The format of a file that training's decoder reads and in which no other could see another picture, else None.

    Raises:
        BadImage: see `images.inspect`.
    """
    header = inspect(data, NO_LIMIT)
    if not header.plain:
        return None
    hidden: bytes | bytearray = data
    if header.exif_at:
        hidden = bytearray(data)
        hide_exif(hidden, header)
    image = _decoded(bytes(hidden))
    return header.format if image is not None and (image.height, image.width) == (header.rows, header.cols) else None


def check(data: bytes, max_pixels: int = NO_LIMIT) -> None:
    """Inspect and decode a file as training and evaluation do.

    Raises:
        BadImage: see `images.inspect`, `images.decode` and `require_equal_pictures`.
    """
    inspect(data, max_pixels)
    require_equal_pictures(data, decode_stored(data).stored)


def decode_deep(data: bytes) -> np.ndarray | None:
    """`[H, W, C]` with the depth and channels of the file, by nvImageCodec; None if it gives up."""
    from nvidia.nvimgcodec import ColorSpec, DecodeParams

    as_it_is = DecodeParams(apply_exif_orientation=False, color_spec=ColorSpec.UNCHANGED, allow_any_depth=True)
    image: Any = _decoder().decode(data, params=as_it_is)
    return None if image is None else np.asarray(image)


def _decode(data: bytes) -> np.ndarray | None:
    """RGB `[H, W, 3]` by nvImageCodec, which DALI's decoder is made of."""
    image = _decoded(data)
    return None if image is None else np.asarray(image)


def _decoded(data: bytes) -> Any:
    return _decoder().decode(data, params=_local.as_rgb)


def _decoder() -> Any:
    """One per thread."""
    from nvidia.nvimgcodec import CPU_ONLY, NVIMGCODEC_DEVICE_CPU_ONLY, Backend, ColorSpec, DecodeParams, Decoder

    if not hasattr(_local, "decoder"):
        _local.decoder = Decoder(
            device_id=NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[Backend(CPU_ONLY)]
        )
        _local.as_rgb = DecodeParams(apply_exif_orientation=False, color_spec=ColorSpec.SRGB)
    return _local.decoder


def _differ(ones: np.ndarray, others: np.ndarray) -> bool:
    if ones.shape != others.shape:
        return True
    rows = max(_STRIP // max(ones[0].size, 1), 1)
    far = total = 0
    for start in range(0, len(ones), rows):
        x, y = ones[start : start + rows], others[start : start + rows]
        apart = np.maximum(x, y) - np.minimum(x, y)
        far += int((apart > _FAR).sum())
        total += int(apart.sum(dtype=np.int64))
    return far > _FAR_SHARE * ones.size or total > _MEAN * ones.size
