"""Images that are not 8-bit RGB: 1 to 16 channels of integers or floats, decoded here and never by DALI.

So a member that is damaged, of another byte order or of more channels costs its own sample and no batch, and training
and evaluation cannot read it in two ways.
"""

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.catalog import Pixels
from pipeline.data.decoders import NO_LIMIT, decode_deep
from pipeline.data.images import BadImage, Header, inspect, open_image

if TYPE_CHECKING:
    from PIL import Image

MOST_CHANNELS = 16
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_ORIENTATION = 274
_PNG_DEPTH, _PNG_COLOUR, _PNG_COLOURS = 24, 25, (2, 4, 6)  # places in the file; kinds that Pillow cuts to 8 bits
_VALUES, _TAILS = 4096, (0.1, 99.9)  # that are kept of an image to find a range, and the percentiles that it spans
_LUMA = np.array([0.299, 0.587, 0.114])


def has_values(data: bytes | bytearray) -> bool:
    """Whether the file is of a format that 8-bit RGB training does not read."""
    return bytes(data[:6]) == _NPY or bytes(data[:4]) in _TIFF


def name_of(data: bytes | bytearray) -> str:
    """The format of such a file."""
    return "npy" if bytes(data[:6]) == _NPY else "tif"


def decode_values(data: bytes | bytearray, max_pixels: int, channels: int | None = None) -> tuple[np.ndarray, Header]:
    """Decode an image with the depth and the channels it has.

    Of PNG, JPEG and WebP, whose channels are grey, colours and transparency, those that are wanted are made: luma of
    colours, equal colours of grey, no transparency where there is no room for it. Others are taken as they are. An
    array `[C, H, W]` is told from `[H, W, C]` by its last side, if that is too long for channels.

    Args:
        data: PNG, TIFF, JPEG, WebP or a numpy file of two or three dimensions.
        max_pixels: larger images are refused.
        channels: that the image must have; None for any.

    Returns:
        `[H, W, C]` as stored, and a header with size and orientation.

    Raises:
        BadImage: reason `empty`, `format`, `header`, `huge`, `truncated`, `decode`, `channels` or `precision` (no
            integers, no floats).
    """
    if not data:
        raise BadImage("empty")
    orientation = 1
    if bytes(data[:6]) == _NPY:
        pixels = _numpy(data, max_pixels)
    elif bytes(data[:4]) in _TIFF:
        pixels, orientation = _tiff(data, max_pixels)
    else:
        header = inspect(data, max_pixels)
        pixels, orientation = _with_channels(_picture(data, header), channels), header.orientation
    if pixels.dtype.kind not in "uif":
        raise BadImage("precision")
    if pixels.shape[2] != (channels or pixels.shape[2]) or pixels.shape[2] > MOST_CHANNELS:
        raise BadImage("channels")
    rows, cols = pixels.shape[:2]
    return pixels, Header("values", rows, cols, orientation, True, ())


def measure_values(files: Iterable[bytes | bytearray]) -> Pixels | None:
    """Statistics of images that have the most frequent number of channels; None if none is usable."""
    by_channels: dict[int, list[tuple[np.ndarray, ...]]] = {}
    for data in files:
        try:
            pixels = decode_values(data, NO_LIMIT)[0]
        except BadImage:
            continue
        flat = pixels.reshape(-1, pixels.shape[2]).astype(np.float64)
        whole = pixels.dtype.kind != "f"
        if not whole:
            flat[~np.isfinite(flat)] = np.nan
            if np.isnan(flat).all(0).any():
                continue
        some = flat[:: max(len(flat) // _VALUES, 1)]
        extremes = np.array([np.nanmin(flat), np.nanmax(flat), whole])
        found = (np.nanmean(flat, 0), np.nanmean(flat**2, 0), extremes, some[~np.isnan(some)])
        by_channels.setdefault(pixels.shape[2], []).append(found)
    if not by_channels:
        return None
    means, squares, extremes, values = zip(*max(by_channels.values(), key=len), strict=True)
    mean = np.mean(means, 0)
    std = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, 0))
    low, high, whole = np.min(extremes, 0)[0], np.max(extremes, 0)[1], np.min(extremes, 0)[2]
    if whole and low >= 0:
        return Pixels(len(means), "integers", float(low), float(high), mean.tolist(), std.tolist())
    low, high = np.percentile(np.concatenate(values), _TAILS)
    return Pixels(len(means), "floats", float(low), float(high), mean.tolist(), std.tolist())


def scaled(pixels: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Values as fp32, the range as 0 to 1; what lies beyond is clipped to it, and what is no number to its low end."""
    low, high = value_range
    values = pixels.astype(np.float32)
    if pixels.dtype.kind == "f":
        np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values -= np.float32(low)
    values *= np.float32(1 / (high - low))
    return np.clip(values, 0, 1, out=values)


def _shaped(shape: tuple[int, ...], max_pixels: int) -> None:
    """Refuse what is no image, or too large a one, before its values are touched."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage("header")
    if math.prod(shape) > max_pixels * MOST_CHANNELS:
        raise BadImage("huge")


def _channels_last(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.shape[2] > MOST_CHANNELS >= pixels.shape[0]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise BadImage("huge")
    return pixels


def _numpy(data: bytes | bytearray, max_pixels: int) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except Exception as error:  # it is Python text, which may be anything
        raise BadImage("header") from error
    _shaped(shape, max_pixels)
    if dtype.kind not in "uif":  # objects would be unpickled
        raise BadImage("precision")
    if len(data) - file.tell() < math.prod(shape) * dtype.itemsize:
        raise BadImage("truncated")
    flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    return _channels_last(flat.reshape(shape, order="F" if by_columns else "C"), max_pixels)


def _tiff(data: bytes | bytearray, max_pixels: int) -> tuple[np.ndarray, int]:
    """The first picture of a TIFF, and its orientation."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page: Any = tiff.pages[0]
            _shaped(page.shape, max_pixels)
            last = max(np.add(page.dataoffsets, page.databytecounts))
            if last > len(data):
                raise BadImage("truncated")
            tag = page.tags.get(_TIFF_ORIENTATION)
            orientation = int(tag.value) if tag and 1 <= tag.value <= 8 else 1
            try:
                pixels: np.ndarray | None = page.asarray()
            except ValueError:  # a compression that wants a further package
                pixels = None
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("decode") from error
    if pixels is None:
        pixels = decode_deep(bytes(data))
    if pixels is None:
        raise BadImage("decode")
    return _channels_last(pixels, max_pixels), orientation


def _picture(data: bytes | bytearray, header: Header) -> np.ndarray:
    """`[H, W, C]` of a PNG, JPEG or WebP."""
    if header.format == "png" and data[_PNG_DEPTH] == 16 and data[_PNG_COLOUR] in _PNG_COLOURS:
        found = decode_deep(bytes(data))
        if found is None:
            raise BadImage("decode")
        return found
    image = open_image(data)
    try:
        pixels = np.asarray(_plain(image))
    except Exception as error:
        raise BadImage("decode") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _plain(image: "Image.Image") -> "Image.Image":
    """Grey or colours, with or without transparency."""
    if image.mode in ("L", "LA", "RGB", "RGBA") or image.mode.startswith("I"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _with_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    here = pixels.shape[2]
    if channels is None or here == channels:
        return pixels
    colours = pixels[..., : here - (here in (2, 4))]
    if channels == 1 and colours.shape[2] == 3:
        return np.rint(colours @ _LUMA).astype(pixels.dtype)[..., None]
    if channels == 3 and colours.shape[2] == 1:
        return colours.repeat(3, 2)
    return colours
