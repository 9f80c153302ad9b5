"""Orientation, colour, blur, solarisation and normalisation of cropped images, driven by parameters drawn before.

Letters: N crops, S pixels of a side, C channels of three. Every operation ends in whole levels of 0 to 255, as they do
one by one in DALI; only the blur's two passes keep fractions between them.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton

LUMA = (0.299, 0.587, 0.114)
REACH = 4
"""Pixels to either side that the blur looks at; beyond the border it sees the image mirrored at the last pixel."""

# NTSC's: luma and two colour differences; hue turns the latter, saturation scales them
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))


class Column(IntEnum):
    """Columns of the parameters of a crop: hue in degrees, factors, sigma in pixels (0: no blur), the rest 0 or 1.

    A crop is transposed, then mirrored left to right (`MIRROR_X`) and top to bottom, before all else.
    """

    HUE = 0
    SATURATION = 1
    CONTRAST = 2
    BRIGHTNESS = 3
    SIGMA = 4
    SOLARIZE = 5
    TRANSPOSE = 6
    MIRROR_X = 7
    MIRROR_Y = 8


class Normalisation(NamedTuple):
    """Of pixels in 0 to 1, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TONE, TURN, BLUR, WIDTH = 9, 12, 16, 17 + REACH
"""Where in a row of `table` its parts begin, and how long it is; the matrix of the colours is first."""


def table(parameters: Tensor, hue: str) -> Tensor:
    """What the parameters say, in the form in which it is used.

    Args:
        parameters: `[N, len(Column)]`.
        hue: "yiq" turns hue and saturation together in YIQ, "hsv" the hue before in HSV, as torchvision does.

    Returns:
        fp32 `[N, WIDTH]`: the matrix that channels are multiplied by, row by row; contrast, brightness, whether to
        solarise; whether to transpose, to mirror in x, in y, and the hue in sixths of a circle if it is turned in HSV;
        weights of the blur by distance.

    Raises:
        ValueError: `hue` is unknown, or the parameters have another shape.
    """
    if hue not in ("yiq", "hsv"):
        raise ValueError(f"hue={hue!r} is unknown; expected yiq or hsv")
    if parameters.ndim != 2 or parameters.shape[1] != len(Column):
        raise ValueError(f"parameters: expected [N, {len(Column)}], got {list(parameters.shape)}")
    p = parameters.to(torch.float32)
    degrees, none = p[:, Column.HUE], torch.zeros_like(p[:, Column.HUE])
    by_matrix, in_hsv = (none, degrees / 60) if hue == "hsv" else (torch.deg2rad(degrees), none)
    distances = torch.arange(1 + REACH, device=p.device)
    sigma = p[:, Column.SIGMA, None]
    weights = torch.where(sigma > 0, torch.exp(-(distances**2) / (2 * sigma**2)), (distances == 0).float())
    return torch.cat(
        [
            _matrices(by_matrix, p[:, Column.SATURATION]).flatten(1),
            p[:, [Column.CONTRAST, Column.BRIGHTNESS, Column.SOLARIZE]],
            p[:, Column.TRANSPOSE :],
            in_hsv[:, None],
            weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1]),
        ],
        1,
    )


def colour(crops: Tensor, looked_up: Tensor, normalisation: Normalisation, *, dtype: torch.dtype, impl: str) -> Tensor:
    """Turn, colour, blur, solarise and normalise crops, in this order of DINO's augmentation.

    Args:
        crops: uint8 `[N, S, S, 3]`.
        looked_up: their `table`, on the same device.
        normalisation: what the result is normalised by.
        dtype: of the result: float32, bfloat16 or float16.
        impl: "eager" or "triton".

    Returns:
        `[N, 3, S, S]`.

    Raises:
        ValueError: shapes or dtypes do not fit, or `impl` is unknown or cannot run here.
    """
    if crops.ndim != 4 or crops.shape[1] != crops.shape[2] or crops.shape[3] != 3 or crops.dtype != torch.uint8:
        raise ValueError(f"crops: expected uint8 [N, S, S, 3], got {crops.dtype} {list(crops.shape)}")
    if crops.shape[1] <= REACH:
        raise ValueError(f"crops: expected sides of more than {REACH} pixels, got {crops.shape[1]}")
    if looked_up.shape != (len(crops), WIDTH) or looked_up.dtype != torch.float32:
        raise ValueError(f"table: expected fp32 {[len(crops), WIDTH]}, got {list(looked_up.shape)}")
    out = torch.empty(len(crops), 3, *crops.shape[1:3], dtype=dtype, device=crops.device)
    if not use_triton(impl, out):
        return out.copy_(_eager(crops, looked_up, normalisation))
    from kernels.fused.colours import colour as fused

    return fused(crops.contiguous(), looked_up.contiguous(), (TONE, TURN, BLUR), LUMA, normalisation, out)


def _matrices(turned: Tensor, saturation: Tensor) -> Tensor:
    """`[N, 3, 3]` that turn the hue by radians and scale the saturation; without saturation all channels are luma."""
    cosine, sine = turned.cos() * saturation, turned.sin() * saturation
    zero, one = torch.zeros_like(turned), torch.ones_like(turned)
    middle = torch.stack([one, zero, zero, zero, cosine, sine, zero, -sine, cosine], 1).view(-1, 3, 3)
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    to_rgb, to_yiq = (matrix.to(turned) for matrix in (to_yiq.inverse(), to_yiq))
    grey, unchanged = (flag.view(-1, 1, 1) for flag in (saturation == 0, (turned == 0) & (saturation == 1)))
    luma = torch.tensor(LUMA, device=turned.device).expand(3, 3)
    changed = torch.where(grey, luma, to_rgb @ middle @ to_yiq)
    return torch.where(unchanged, torch.eye(3, device=turned.device), changed)


def _eager(crops: Tensor, looked_up: Tensor, normalisation: Normalisation) -> Tensor:
    """Levels as fp32; one operation after the other."""

    def each(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    x = crops.permute(0, 3, 1, 2).float()
    transpose, mirror_x, mirror_y, turned = map(each, looked_up[:, TURN:BLUR].unbind(1))
    x = torch.where(transpose > 0, x.transpose(2, 3), x)
    x = torch.where(mirror_x > 0, x.flip(3), x)
    x = torch.where(mirror_y > 0, x.flip(2), x)
    x = torch.where(turned != 0, _turn_hue(x, turned), x)
    x = _whole(torch.einsum("nij,njyx->niyx", looked_up[:, :TONE].view(-1, 3, 3), x))
    contrast, brightness, solarize = map(each, looked_up[:, TONE:TURN].unbind(1))
    luma = torch.tensor(LUMA, device=x.device).view(3, 1, 1)
    centre = each((x * luma).sum(1).mean((1, 2)))
    x = _whole(_whole(centre + contrast * (x - centre)) * brightness)
    for axis in (3, 2):
        x = _blurred(x, looked_up[:, BLUR:], axis)
    x = _whole(x)
    x = torch.where((solarize > 0) & (x >= 128), 255 - x, x)
    mean, std = (255 * torch.tensor(values, device=x.device).view(3, 1, 1) for values in normalisation)
    return (x - mean) / std


def _whole(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


def _turn_hue(x: Tensor, turned: Tensor) -> Tensor:
    """Turn by sixths of a circle."""
    r, g, b = x.split(1, 1)
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    per_chroma = 1 / chroma.clamp(min=1)  # chroma is a whole number, and without it there is no hue
    green = torch.where(g == value, (b - r) * per_chroma + 2, (r - g) * per_chroma + 4)
    sector = torch.where(r == value, (g - b) * per_chroma, green) + turned
    k = torch.remainder(sector + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(3, 1, 1), 6)
    return _whole(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))


def _blurred(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Along one axis; `weights` are those of each distance."""
    size = x.shape[axis]
    places = torch.arange(size, device=x.device)
    out = weights[:, 0].view(-1, 1, 1, 1) * x
    for distance in range(1, 1 + REACH):
        before = (places - distance).abs()
        after = size - 1 - (size - 1 - places - distance).abs()
        pair = x.index_select(axis, before) + x.index_select(axis, after)
        out = out + weights[:, distance].view(-1, 1, 1, 1) * pair
    return out
