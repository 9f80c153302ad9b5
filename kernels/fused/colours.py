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
    crops, table, planes, sums, S, luma_r, luma_g, luma_b, TURN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    crop = tl.program_id(0).to(tl.int64)
    row, turn = table + WIDTH * crop, table + WIDTH * crop + TURN
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    y, x = at // S, at % S
    x = tl.where(tl.load(turn + 1) > 0, S - 1 - x, x)
    y = tl.where(tl.load(turn + 2) > 0, S - 1 - y, y)
    source = crops + 3 * (crop * S * S + tl.where(tl.load(turn) > 0, x * S + y, y * S + x))
    r = tl.load(source, mask=inside, other=0).to(tl.float32)
    g = tl.load(source + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + 2, mask=inside, other=0).to(tl.float32)
    turned = tl.load(turn + 3)
    if turned != 0:
        value = tl.maximum(tl.maximum(r, g), b)
        chroma = value - tl.minimum(tl.minimum(r, g), b)
        per_chroma = tl.div_rn(1.0, tl.maximum(chroma, 1.0))
        sector = tl.where(g == value, (b - r) * per_chroma + 2.0, (r - g) * per_chroma + 4.0)
        sector = tl.where(r == value, (g - b) * per_chroma, sector) + turned
        r = _by_hue(value, chroma, sector + 5.0)
        g = _by_hue(value, chroma, sector + 3.0)
        b = _by_hue(value, chroma, sector + 1.0)
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
    planes, sums, table, out, S, tiles, TONE: tl.constexpr, BLUR: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    crop = plane // 3
    tone, weights = table + WIDTH * crop + TONE, table + WIDTH * crop + BLUR
    tile = tl.arange(0, TILES)
    centre = tl.sum(tl.load(sums + crop * tiles + tile, mask=tile < tiles, other=0.0), 0) / (S * S)
    contrast, brightness = tl.load(tone), tl.load(tone + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    x = at % S
    here = planes + plane * S * S
    total = tl.load(weights) * _toned(here, at, inside, centre, contrast, brightness)
    for distance in tl.static_range(1, WIDTH - BLUR):
        before = at - x + tl.abs(x - distance)
        after = at - x + S - 1 - tl.abs(S - 1 - x - distance)
        pair = _toned(here, before, inside, centre, contrast, brightness)
        pair += _toned(here, after, inside, centre, contrast, brightness)
        total += tl.load(weights + distance) * pair
    tl.store(out + plane * S * S + at, total, mask=inside)


@triton.jit
def _columns_kernel(
    rows, table, out, S, mean_r, mean_g, mean_b, std_r, std_g, std_b, SOLARIZE: tl.constexpr, BLUR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    crop, channel = plane // 3, plane % 3
    weights = table + WIDTH * crop + BLUR
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S * S
    y, x = at // S, at % S
    here = rows + plane * S * S
    total = tl.load(weights) * tl.load(here + at, mask=inside, other=0.0)
    for distance in tl.static_range(1, WIDTH - BLUR):
        before = tl.load(here + tl.abs(y - distance) * S + x, mask=inside, other=0.0)
        after = tl.load(here + (S - 1 - tl.abs(S - 1 - y - distance)) * S + x, mask=inside, other=0.0)
        total += tl.load(weights + distance) * (before + after)
    level = _whole(total)
    solarized = tl.where(level >= 128, 255.0 - level, level)
    level = tl.where(tl.load(table + WIDTH * crop + SOLARIZE) > 0, solarized, level)
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    value = tl.div_rn(level - mean, std)
    tl.store(out + plane * S * S + at, value.to(out.dtype.element_ty), mask=inside)


def colour(
    crops: Tensor,
    table: Tensor,
    parts: tuple[int, int, int],
    luma: tuple[float, float, float],
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]],
    out: Tensor,
) -> Tensor:
    """Fill `out`; see `kernels.colours`.

    Args:
        crops: uint8 `[N, S, S, 3]`, contiguous.
        table: fp32 `[N, width]`, contiguous; the colours' matrix first.
        parts: where tone, turn and blur begin in a row of it; the flag to solarise ends the tone.
        luma: weights of the channels in a crop's mean.
        normalisation: mean and standard deviation of pixels in 0 to 1.
        out: `[N, 3, S, S]`, contiguous.
    """
    (count, size), width, (tone, turn, blur) = crops.shape[:2], table.shape[1], parts
    tiles = triton.cdiv(size * size, BLOCK)
    planes = torch.empty(count, 3, size, size, dtype=torch.uint8, device=crops.device)
    rows = torch.empty(planes.shape, dtype=torch.float32, device=crops.device)
    sums = torch.empty(count, tiles, dtype=torch.float32, device=crops.device)
    _colour_kernel[(count, tiles)](crops, table, planes, sums, size, *luma, TURN=turn, WIDTH=width, BLOCK=BLOCK)
    _rows_kernel[(3 * count, tiles)](
        planes, sums, table, rows, size, tiles, TONE=tone, BLUR=blur, WIDTH=width,
        TILES=triton.next_power_of_2(tiles), BLOCK=BLOCK,
    )  # fmt: skip
    mean, std = ([255 * value for value in values] for values in normalisation)
    _columns_kernel[(3 * count, tiles)](
        rows, table, out, size, *mean, *std, SOLARIZE=turn - 1, BLUR=blur, WIDTH=width, BLOCK=BLOCK
    )
    return out
