"""Random parameters of crops, from numpy: a sample's depend on the seed and its position alone.

Probabilities and ranges are those of DINO and DINOv2.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from kernels.colours import table
from pipeline.config import DataConfig
from pipeline.data.images import Header
from pipeline.data.intake import CHANNELS
from pipeline.data.philox import Purpose, philox
from pipeline.data.values import MOST_CHANNELS

GLOBAL_CROPS = 2

_BOX_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_JITTER, _JITTER_PROBABILITY = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}, 0.8
_GREY_PROBABILITY, _SOLARIZE_PROBABILITY, _FLIP_PROBABILITY = 0.2, 0.2, 0.5
_SIGMA = (0.1, 2.0)
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
    """What `kernels.colours` wants to know of crops, by their parameters: fp32 `[..., WIDTH]`, and behind that, as in
    `drawn`, which channels are kept."""
    columns = torch.from_numpy(drawn[..., P.HUE :])
    colours, kept = columns.tensor_split([len(P) - P.HUE], -1)
    return torch.cat([table(colours.flatten(0, -2), hue).unflatten(0, colours.shape[:-1]), kept], -1)


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
