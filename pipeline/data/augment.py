"""Multi-crop augmentation: all random parameters from numpy, one DALI graph that executes them on CPU or GPU.

The operations and their order are fixed: crop, flip and resize, hue, saturation (0 for grey), contrast, brightness,
blur, solarisation, normalisation. (torchvision's ColorJitter draws the order of its four operations anew each time.)
Probabilities and ranges are those of DINO and DINOv2.

Hue, saturation, grey and solarisation are of 8-bit RGB alone. Other images have contrast about the mean of all
channels, brightness and blur, on values that are in 0..1 before them; both kinds may drop channels.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.colours import table
from pipeline.config import DataConfig
from pipeline.data.generated import remove_generated_files
from pipeline.data.images import Header
from pipeline.data.intake import CHANNELS, Intake
from pipeline.data.philox import Purpose, philox
from pipeline.data.values import MOST_CHANNELS

LUMA = (0.299, 0.587, 0.114)
GLOBAL_CROPS = 2

Where = Callable[[Any, Callable[[Any], Any], Any], Any]
"""condition, change, x -> `change(x)` for those samples of a batch where the condition holds, x for the others."""

_BOX_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_JITTER, _JITTER_PROBABILITY = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}, 0.8
_GREY_PROBABILITY, _SOLARIZE_PROBABILITY, _FLIP_PROBABILITY = 0.2, 0.2, 0.5
_SIGMA, _BLUR_WINDOW = (0.1, 2.0), 9
_SOLARIZED = [v if v < 128 else 255 - v for v in range(256)]  # by the level
# EXIF orientations 1..8 as: transpose, then mirror left-right, then top-bottom
_TURNS = np.array(
    [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]],
    dtype=bool,
)
_DRAWS = 2 * _BOX_TRIES + 12  # uniforms per crop: a multiple of Philox's block of 4


class P(IntEnum):
    """Columns of the parameters of a crop.

    The box is in pixels of the image as stored; the crop is then transposed and mirrored, which puts it upright and
    flips it at random. Hue in degrees; saturation, contrast and brightness are factors; sigma in pixels (0: no blur).
    """

    TOP = 0
    LEFT = 1
    BOTTOM = 2
    RIGHT = 3
    HUE = 4
    SATURATION = 5
    CONTRAST = 6
    BRIGHTNESS = 7
    SIGMA = 8
    SOLARIZE = 9
    TRANSPOSE = 10
    MIRROR_X = 11
    MIRROR_Y = 12


def colour_table(drawn: np.ndarray, hue: str) -> Tensor:
    """What `kernels.colours` wants to know of crops, by parameters `[..., len(P)]`: fp32 `[..., width]`."""
    columns = torch.from_numpy(drawn[..., P.HUE : len(P)])
    return table(columns.flatten(0, -2), hue).unflatten(0, columns.shape[:-1])


def parameters(
    data: DataConfig, position: int | np.ndarray, headers: Sequence[Header], channels: int = CHANNELS
) -> np.ndarray:
    """Augmentation parameters of samples.

    Args:
        position: global positions, rising by runs; of the first one alone if the others follow it. Every sample's draws
            depend on the seed and its own position alone.
        headers: of the B images.
        channels: of all images.

    Returns:
        float32 `[B, 2 + L, len(P)]`; global crops first. With `channel_drop`, a column for each channel follows: 0
        where it is dropped, else 1.
    """
    crops = GLOBAL_CROPS + data.local_crops.count
    positions = position + np.arange(len(headers)) if isinstance(position, int) else position
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    draws = np.concatenate([_draws(data.seed, crops, int(run[0]), len(run)) for run in runs])
    out = np.zeros((len(headers), crops, len(P)), np.float32)
    boxes = _boxes(data, np.array([header.size for header in headers]), draws[..., : 2 * _BOX_TRIES + 2])
    _fill_geometry(out, boxes, draws[..., -1] < _FLIP_PROBABILITY, headers)
    _fill_colours(out, draws[..., 2 * _BOX_TRIES + 2 : -1], data.blur)
    if data.channel_drop:
        kept = np.concatenate([_kept_channels(data, run, crops, channels) for run in runs])
        out = np.concatenate([out, kept], -1)
    return out


def _draws(seed: int, crops: int, position: int, count: int) -> np.ndarray:
    """Of consecutive positions."""
    generator = philox(seed, Purpose.AUGMENT, crops, block=position * crops * _DRAWS // 4)
    return generator.random((count, crops, _DRAWS))


def _kept_channels(data: DataConfig, run: np.ndarray, crops: int, channels: int) -> np.ndarray:
    """1 or 0 for each channel of each crop of consecutive positions; one is always left."""
    generator = philox(data.seed, Purpose.CHANNELS, crops, block=int(run[0]) * crops * MOST_CHANNELS // 4)
    draws = generator.random((len(run), crops, MOST_CHANNELS))[..., :channels]
    kept = (draws >= data.channel_drop) | (draws == draws.max(-1, keepdims=True))
    return kept.astype(np.float32)


def _boxes(data: DataConfig, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Top, left, bottom, right of random resized crops: the first of ten tries that fits, else a central crop."""
    count = data.local_crops.count
    low, high = np.array([data.global_crops.scale] * GLOBAL_CROPS + [data.local_crops.scale] * count).T[..., None]
    height, width = (sizes[:, None, i].astype(np.float64) for i in (0, 1))
    area = (height * width)[..., None] * (low + (high - low) * draws[..., :_BOX_TRIES])
    log_low, log_high = np.log(_RATIO)
    ratio = np.exp(log_low + (log_high - log_low) * draws[..., _BOX_TRIES : 2 * _BOX_TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    first = fits.argmax(-1)[..., None]
    w, h = (np.take_along_axis(side, first, -1)[..., 0] for side in (w, h))
    fit = fits.any(-1)
    w = np.where(fit, w, np.minimum(width, np.rint(height * _RATIO[1])))
    h = np.where(fit, h, np.minimum(height, np.rint(width / _RATIO[0])))
    top, left = (
        np.where(fit, np.floor(draw * (whole - part + 1)), (whole - part) // 2)
        for draw, whole, part in ((draws[..., -2], height, h), (draws[..., -1], width, w))
    )
    return np.stack([top, left, top + h, left + w], -1)


def _fill_geometry(out: np.ndarray, boxes: np.ndarray, flip: np.ndarray, headers: Sequence[Header]) -> None:
    """Express boxes of upright images, and the flip of the upright crop, in the frames the images are stored in."""
    height, width = np.array([header.size for header in headers])[:, None].transpose(2, 0, 1)
    orientation = np.array([header.orientation for header in headers])
    transpose, mirror_x, mirror_y = _TURNS[orientation - 1].T[..., None]
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    left, right = np.where(mirror_x, width - right, left), np.where(mirror_x, width - left, right)
    top, bottom = np.where(mirror_y, height - bottom, top), np.where(mirror_y, height - top, bottom)
    upright = np.stack([top, left, bottom, right], -1)
    out[..., : P.RIGHT + 1] = np.where(transpose[..., None], upright[..., [1, 0, 3, 2]], upright)
    out[..., P.TRANSPOSE], out[..., P.MIRROR_X], out[..., P.MIRROR_Y] = transpose, mirror_x ^ flip, mirror_y


def _fill_colours(out: np.ndarray, draws: np.ndarray, blur: tuple[float, float, float]) -> None:
    jitter = draws[..., 0] < _JITTER_PROBABILITY
    grey = draws[..., 1] < _GREY_PROBABILITY

    def factor(draw: np.ndarray, reach: float, centre: float) -> np.ndarray:
        return np.where(jitter, centre + reach * (2 * draw - 1), centre)

    out[..., P.HUE] = factor(draws[..., 2], 360 * _JITTER["hue"], 0)
    out[..., P.SATURATION] = np.where(grey, 0, factor(draws[..., 3], _JITTER["saturation"], 1))
    out[..., P.CONTRAST] = factor(draws[..., 4], _JITTER["contrast"], 1)
    out[..., P.BRIGHTNESS] = factor(draws[..., 5], _JITTER["brightness"], 1)
    probability = np.array([*blur[:2], *[blur[2]] * (out.shape[1] - GLOBAL_CROPS)])
    sigma = _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * draws[..., 7]
    out[..., P.SIGMA] = np.where(draws[..., 6] < probability, sigma, 0)
    out[:, 1, P.SOLARIZE] = draws[:, 1, 8] < _SOLARIZE_PROBABILITY


def make_pipeline(
    data: DataConfig,
    source: Callable[[int], tuple[Any, Any, Any]],
    *,
    device_id: int | None,
    half: bool,
    coloured: bool = True,
    intake: Intake | None = None,
) -> Any:
    """A DALI pipeline that executes the parameters; it is built by its first `run`.

    Args:
        source: batch number -> (images as `Intake.open` has them, their `parameters`, positions `[B, 1]`).
        device_id: CUDA device, None for the CPU.
        half: float16 instead of float32 output.
        coloured: False ends with crops of 8-bit RGB that are cut out and resized, which `kernels.colours` then does the
            rest to.
        intake: of the images; by default as `data` says of 8-bit RGB.

    Outputs per batch, the first two on the CPU: positions int64 `[B, 1]`, shapes int64 `[B, 3]` of the decoded images,
    global crops `[B, 2, C, S, S]` and, if there are any, local crops `[B, L, C, s, s]`; not coloured, they are uint8
    `[B, 2, S, S, 3]` and `[B, L, s, s, 3]`.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    how = intake or Intake.of(data)

    @do_not_convert
    def outputs(rewritten: Where) -> tuple[Any, ...]:
        def where(condition: Any, change: Callable[[Any], Any], x: Any) -> Any:
            return rewritten(condition, do_not_convert(change), x)

        given, drawn, positions = fn.external_source(
            source=source,
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8 if how.is_rgb else types.FLOAT, types.FLOAT, types.INT64],
            ndim=[1 if how.is_rgb else 3, 2, 1],
            layout=["" if how.is_rgb else "HWC", "", ""],
        )
        image = _decode(given, device_id) if how.is_rgb else given if device_id is None else given.gpu()
        shapes = image.shape() if how.is_rgb else given.shape()
        local = data.local_crops
        rows = [drawn[i] for i in range(GLOBAL_CROPS + local.count)]
        sizes = [data.global_crops.size] * GLOBAL_CROPS + [local.size] * local.count
        crops = [_cut(image, row, size) for row, size in zip(rows, sizes, strict=True)]
        if coloured:
            change = partial(_colour, hue=data.hue) if how.is_rgb else partial(_change_values, channels=how.channels)
            crops = [change(crop, row, where) for crop, row in zip(crops, rows, strict=True)]
            if how.is_rgb:
                crops[1] = _solarize(crops[1], rows[1], where)
        groups = [group for group in (crops[:GLOBAL_CROPS], crops[GLOBAL_CROPS:]) if group]
        found = [_normalize(group, how, half) if coloured else _stack(group) for group in groups]
        if coloured and data.channel_drop:
            found = [_drop_channels(x, drawn, i * GLOBAL_CROPS) for i, x in enumerate(found)]
        return positions, shapes, *found

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Any, ...]:
        # the one condition, for DALI rewrites all functions that it finds to hold some: half a second for this file
        def where(condition: Any, change: Callable[[Any], Any], x: Any) -> Any:
            if condition:
                x = change(x)
            return x

        return outputs(where)

    pipeline = graph(
        batch_size=data.batch_size, num_threads=data.threads, device_id=device_id, seed=0, prefetch_queue_depth=2
    )
    remove_generated_files()
    return pipeline


def decode_pipeline(source: Callable[[int], Any], batch_size: int, threads: int, device_id: int | None) -> Any:
    """A pipeline that does no more than decode; its output is the shape of each image, int64 `[B, 3]`."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
        return _decode(encoded, device_id).shape()

    return graph()


def undecodable(encoded: Sequence[np.ndarray], headers: Sequence[Header], device_id: int | None) -> list[int]:
    """Which of these files the pipeline's decoder gives up on, or finds of another size than their headers say."""
    current: list[np.ndarray] = []
    culprits, pipeline = [], None
    for i, (data, header) in enumerate(zip(encoded, headers, strict=True)):
        current[:] = [data]
        pipeline = pipeline or decode_pipeline(lambda _: current, 1, 1, device_id)
        try:
            size = tuple(pipeline.run()[0].at(0))[:2]
        except RuntimeError:  # DALI promises nothing of a pipeline that has failed
            size, pipeline = None, None
        if size != (header.rows, header.cols):
            culprits.append(i)
    return culprits


def _decode(encoded: Any, device_id: int | None) -> Any:
    from nvidia.dali import fn, types

    return fn.decoders.image(
        encoded,
        device="cpu" if device_id is None else "mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg does; the GPU decoder would otherwise repeat chroma
    )


def _cut(image: Any, p: Any, size: int) -> Any:
    """One crop, HWC; `p` is its row of parameters."""
    from nvidia.dali import fn, types

    # `roi_start` of `resize` would save this copy, but lets the kernel reach beyond the box: up to 50 levels at borders
    box = fn.cast(p[P.TOP : P.RIGHT + 1], dtype=types.INT32)
    x = fn.slice(image, start=box[:2], end=box[2:], axes=(0, 1))
    return fn.resize(x, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)


def _turn(x: Any, p: Any, where: Where) -> Any:
    """A crop put upright and flipped."""
    from nvidia.dali import fn, types

    x = where(p[P.TRANSPOSE] > 0.0, lambda x: fn.transpose(x, perm=[1, 0, 2], transpose_layout=False), x)
    return fn.flip(
        x, horizontal=fn.cast(p[P.MIRROR_X], dtype=types.INT32), vertical=fn.cast(p[P.MIRROR_Y], dtype=types.INT32)
    )


def _blur(x: Any, p: Any, where: Where) -> Any:
    from nvidia.dali import fn

    return where(p[P.SIGMA] > 0.0, lambda x: fn.gaussian_blur(x, window_size=_BLUR_WINDOW, sigma=p[P.SIGMA]), x)


def _change_values(x: Any, p: Any, where: Where, *, channels: int) -> Any:
    """All that is done to a crop of an image that is not 8-bit RGB, float32 HWC."""
    from nvidia.dali import types

    x = _turn(x, p, where)
    x = _contrast_and_brightness(x, p, np.full(channels, 1 / channels, np.float32), types.FLOAT)
    return _blur(x, p, where)


def _colour(x: Any, p: Any, where: Where, *, hue: str) -> Any:
    """All that is done to a crop before it is solarised, if it is; uint8 HWC."""
    from nvidia.dali import types

    x = _turn(x, p, where)
    if hue == "hsv":
        x = where(p[P.HUE] != 0.0, lambda x: _turn_hue(x, p), x)
        x = _saturate(x, p, where)
    else:
        x = _saturate_and_turn_hue(x, p, where)
    x = _contrast_and_brightness(x, p, np.array(LUMA, np.float32), types.UINT8)
    return _blur(x, p, where)


def _solarize(x: Any, p: Any, where: Where) -> Any:
    from nvidia.dali import fn, types

    invert = partial(fn.lookup_table, keys=list(range(256)), values=_SOLARIZED, dtype=types.UINT8)
    return where(p[P.SOLARIZE] > 0.0, invert, x)


def _saturate_and_turn_hue(x: Any, p: Any, where: Where) -> Any:
    """Saturation about the luma and hue in YIQ, where both are one matrix; grey has no hue."""
    from nvidia.dali import fn

    saturation, hue = p[P.SATURATION], p[P.HUE]
    x = where(saturation == 0.0, _grey, x)
    coloured = (saturation != 0.0) & ((saturation != 1.0) | (hue != 0.0))
    return where(coloured, lambda x: fn.hsv(x, hue=hue, saturation=saturation), x)


def _saturate(x: Any, p: Any, where: Where) -> Any:
    from nvidia.dali import fn

    saturation = p[P.SATURATION]
    x = where(saturation == 0.0, _grey, x)
    return where((saturation != 0.0) & (saturation != 1.0), lambda x: fn.saturation(x, saturation=saturation), x)


def _grey(x: Any) -> Any:
    from nvidia.dali import fn, types

    luma = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(luma, image_type=types.GRAY, output_type=types.RGB)


def _turn_hue(x: Any, p: Any) -> Any:
    """Turn the hue in HSV space, as torchvision does; DALI's own operator turns it in YIQ."""
    from nvidia.dali import fn, math, types

    r, g, b = (fn.cast(x[:, :, i], dtype=types.FLOAT) for i in range(3))
    value = math.max(math.max(r, g), b)
    chroma = value - math.min(math.min(r, g), b)
    per_chroma = 1.0 / math.max(chroma, 1.0)  # chroma is a whole number, and without it there is no hue
    red, green = r == value, (g == value) & (r != value)
    sector = (
        red * (g - b) * per_chroma
        + green * ((b - r) * per_chroma + 2.0)
        + (1 - red - green) * ((r - g) * per_chroma + 4.0)
    ) + _beside(p[P.HUE] / 60.0 + 6.0, x)
    x = fn.stack(*(_hsv_channel(value, chroma, sector + offset) for offset in (5.0, 3.0, 1.0)), axis=2)
    return fn.reinterpret(x, layout="HWC")


def _hsv_channel(value: Any, chroma: Any, sector: Any) -> Any:
    from nvidia.dali import fn, math, types

    k = sector - 6.0 * math.floor(sector / 6.0)
    weight = math.clamp(math.min(k, 4.0 - k), 0.0, 1.0)
    return fn.cast(value - chroma * weight, dtype=types.UINT8)


def _contrast_and_brightness(x: Any, p: Any, weights: np.ndarray, dtype: Any) -> Any:
    """Contrast about the mean luma (`color_twist` knows only 128), then brightness; `weights` make luma of channels."""
    from nvidia.dali import fn, types

    means = fn.reductions.mean(x, axes=(0, 1), dtype=types.FLOAT)
    centre = fn.reductions.sum(means * types.Constant(weights, device=x.device))
    if x.device == "cpu":
        x = fn.contrast(x, contrast=p[P.CONTRAST], contrast_center=centre)
    else:
        x = _blend(x, centre, p[P.CONTRAST], dtype)
    # not in one operation: what the contrast clips to white is then darkened with the rest
    return fn.brightness(x, brightness=p[P.BRIGHTNESS])


def _blend(x: Any, centre: Any, factor: Any, dtype: Any) -> Any:
    """`fn.contrast` by arithmetic, ten times slower: on a GPU that operator cannot take a centre computed there."""
    from nvidia.dali import fn

    return fn.cast(x * _beside(factor, x) + centre * _beside(1.0 - factor, x), dtype=dtype)


def _beside(value: Any, x: Any) -> Any:
    """Bring a value to the device of `x`."""
    return value.gpu() if x.device == "gpu" else value


def _stack(crops: list[Any]) -> Any:
    from nvidia.dali import fn

    return fn.stack(*crops, axis_name="F")


def _normalize(crops: list[Any], how: Intake, half: bool) -> Any:
    """Stack HWC crops of an image, 8-bit or in 0..1, and normalise them: `[crops, C, size, size]`."""
    from nvidia.dali import fn, types

    levels = 255 if how.is_rgb else 1
    return fn.crop_mirror_normalize(
        _stack(crops),
        mean=[levels * m for m in how.mean],
        std=[levels * s for s in how.std],
        output_layout="FCHW",
        dtype=types.FLOAT16 if half else types.FLOAT,
    )


def _drop_channels(x: Any, drawn: Any, first: int) -> Any:
    """Set channels to their mean, which is 0, in normalised crops from the first on of which parameters are given."""
    from nvidia.dali import fn

    kept = drawn[first:, len(P) :] if first else drawn[:GLOBAL_CROPS, len(P) :]
    return fn.cast_like(x * _beside(fn.expand_dims(kept, axes=[2, 3]), x), x)
