"""Colour, tone and blur of crops in three launches: by pixel, along rows, along columns.

Levels between the launches are uint8 in planes of one channel; only between the blur's passes they have fractions. The
tone is computed again for every pixel that the blur along a row looks at, since its centre, the mean luma of a crop, is
known after the first launch alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _whole(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def _by_hue(value, chroma, sector):
    k = sector - 6.0 * tl.floor(sector / 6.0)
    return _whole(value - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0))


@triton.jit
def _colour_kernel(
    crops, turn, matrices, planes, sums, S, luma_r, luma_g, luma_b, BY_HSV: tl.constexpr, BLOCK: tl.constexpr
):
    crop = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    y, x = at // S, at % S
    x = tl.where(tl.load(turn + 4 * crop + 1) > 0, S - 1 - x, x)
    y = tl.where(tl.load(turn + 4 * crop + 2) > 0, S - 1 - y, y)
    source = crops + 3 * (crop * S * S + tl.where(tl.load(turn + 4 * crop) > 0, x * S + y, y * S + x))
    r = tl.load(source, mask=inside, other=0).to(tl.float32)
    g = tl.load(source + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + 2, mask=inside, other=0).to(tl.float32)
    if BY_HSV:
        turned = tl.load(turn + 4 * crop + 3)
        value = tl.maximum(tl.maximum(r, g), b)
        chroma = value - tl.minimum(tl.minimum(r, g), b)
        per_chroma = tl.div_rn(1.0, tl.maximum(chroma, 1.0))
        sector = tl.where(g == value, (b - r) * per_chroma + 2.0, (r - g) * per_chroma + 4.0)
        sector = tl.where(r == value, (g - b) * per_chroma, sector) + turned
        r = tl.where(turned != 0, _by_hue(value, chroma, sector + 5.0), r)
        g = tl.where(turned != 0, _by_hue(value, chroma, sector + 3.0), g)
        b = tl.where(turned != 0, _by_hue(value, chroma, sector + 1.0), b)
    row = matrices + 9 * crop
    red = _whole(tl.load(row) * r + tl.load(row + 1) * g + tl.load(row + 2) * b)
    green = _whole(tl.load(row + 3) * r + tl.load(row + 4) * g + tl.load(row + 5) * b)
    blue = _whole(tl.load(row + 6) * r + tl.load(row + 7) * g + tl.load(row + 8) * b)
    out = planes + 3 * crop * S * S + at
    tl.store(out, red.to(tl.uint8), mask=inside)
    tl.store(out + S * S, green.to(tl.uint8), mask=inside)
    tl.store(out + 2 * S * S, blue.to(tl.uint8), mask=inside)
    luma = tl.where(inside, luma_r * red + luma_g * green + luma_b * blue, 0.0)
    tl.store(sums + crop * tl.num_programs(1) + tl.program_id(1), tl.sum(luma, 0))


@triton.jit
def _toned(plane, at, inside, centre, contrast, brightness):
    x = tl.load(plane + at, mask=inside, other=0).to(tl.float32)
    return _whole(_whole(centre + contrast * (x - centre)) * brightness)


@triton.jit
def _rows_kernel(
    planes, sums, tone, blur, out, S, tiles, REACH: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    crop = plane // 3
    tile = tl.arange(0, TILES)
    centre = tl.sum(tl.load(sums + crop * tiles + tile, mask=tile < tiles, other=0.0), 0) / (S * S)
    contrast, brightness = tl.load(tone + 3 * crop), tl.load(tone + 3 * crop + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    x = at % S
    here = planes + plane * S * S
    total = tl.load(blur + (REACH + 1) * crop) * _toned(here, at, inside, centre, contrast, brightness)
    for distance in tl.static_range(1, REACH + 1):
        before = at - x + tl.abs(x - distance)
        after = at - x + S - 1 - tl.abs(S - 1 - x - distance)
        pair = _toned(here, before, inside, centre, contrast, brightness)
        pair += _toned(here, after, inside, centre, contrast, brightness)
        total += tl.load(blur + (REACH + 1) * crop + distance) * pair
    tl.store(out + plane * S * S + at, total, mask=inside)


@triton.jit
def _columns_kernel(
    rows, tone, blur, out, S, mean_r, mean_g, mean_b, std_r, std_g, std_b, REACH: tl.constexpr, BLOCK: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    crop, channel = plane // 3, plane % 3
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    y, x = at // S, at % S
    here = rows + plane * S * S
    total = tl.load(blur + (REACH + 1) * crop) * tl.load(here + at, mask=inside, other=0.0)
    for distance in tl.static_range(1, REACH + 1):
        before = tl.load(here + tl.abs(y - distance) * S + x, mask=inside, other=0.0)
        after = tl.load(here + (S - 1 - tl.abs(S - 1 - y - distance)) * S + x, mask=inside, other=0.0)
        total += tl.load(blur + (REACH + 1) * crop + distance) * (before + after)
    level = _whole(total)
    solarized = tl.where(level >= 128, 255.0 - level, level)
    level = tl.where(tl.load(tone + 3 * crop + 2) > 0, solarized, level)
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    value = tl.div_rn(level - mean, std)
    tl.store(out + plane * S * S + at, value.to(out.dtype.element_ty), mask=inside)


def colour(
    crops: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    luma: tuple[float, float, float],
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]],
    out: Tensor,
    *,
    by_hsv: bool,
) -> Tensor:
    """Fill `out`; see `kernels.colours.colour` and `Tables`, whose parts are contiguous.

    Args:
        crops: uint8 `[N, S, S, 3]`, contiguous.
        tables: of all crops.
        luma: weights of the channels in a crop's mean.
        normalisation: mean and standard deviation of pixels in 0 to 1.
        out: `[N, 3, S, S]`, contiguous.
        by_hsv: turn the hue in HSV.
    """
    matrices, tone, turn, blur = tables
    count, size = crops.shape[:2]
    tiles = triton.cdiv(size * size, BLOCK)
    planes = torch.empty(count, 3, size, size, dtype=torch.uint8, device=crops.device)
    rows = torch.empty(planes.shape, dtype=torch.float32, device=crops.device)
    sums = torch.empty(count, tiles, dtype=torch.float32, device=crops.device)
    reach = blur.shape[1] - 1
    _colour_kernel[(count, tiles)](crops, turn, matrices, planes, sums, size, *luma, BY_HSV=by_hsv, BLOCK=BLOCK)
    _rows_kernel[(3 * count, tiles)](
        planes, sums, tone, blur, rows, size, tiles, REACH=reach, TILES=triton.next_power_of_2(tiles), BLOCK=BLOCK
    )
    mean, std = ([255 * value for value in values] for values in normalisation)
    _columns_kernel[(3 * count, tiles)](rows, tone, blur, out, size, *mean, *std, REACH=reach, BLOCK=BLOCK)
    return out
