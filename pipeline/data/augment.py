"""Multi-crop augmentation: one DALI graph, on CPU or GPU, that executes parameters drawn before.

The operations and their order are fixed: crop, flip and resize, hue, saturation (0 for grey), contrast, brightness,
blur, solarisation, normalisation. (torchvision's ColorJitter draws the order of its four operations anew each time.)

Hue, saturation, grey and solarisation are of 8-bit RGB alone. Other images have contrast about the mean of all
channels, brightness and blur, on values that are in 0..1 before them; both kinds may drop channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.draws import GLOBAL_CROPS, P
from pipeline.data.generated import remove_generated_files
from pipeline.data.images import Header
from pipeline.data.intake import Intake

LUMA = (0.299, 0.587, 0.114)

Where = Callable[[Any, Callable[[Any], Any], Any], Any]
"""condition, change, x -> `change(x)` for those samples of a batch where the condition holds, x for the others."""

_BLUR_WINDOW = 9
_SOLARIZED = [v if v < 128 else 255 - v for v in range(256)]  # by the level


def make_pipeline(
    data: DataConfig,
    source: Callable[[int], tuple[Any, Any, Any]],
    *,
    device_id: int | None,
    half: bool,
    coloured: bool = True,
    intake: Intake | None = None,
    prefetch: int = 2,
) -> Any:
    """A DALI pipeline that executes the parameters; it is built by its first `run`.

    Args:
        source: batch number -> (images as `Intake.open` has them, their `parameters`, positions `[B, 1]`).
        device_id: CUDA device, None for the CPU.
        half: float16 instead of float32 output.
        coloured: False ends with crops of 8-bit RGB that are cut out and resized, which `kernels.colours` then does the
            rest to.
        intake: of the images; by default as `data` says of 8-bit RGB.
        prefetch: batches that it makes ahead, that which is asked for among them.

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
        batch_size=data.batch_size,
        num_threads=data.threads,
        device_id=device_id,
        seed=0,
        prefetch_queue_depth=prefetch,
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
