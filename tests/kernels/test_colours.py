"""Colours of crops against formulas in fp64, one crop and one pixel after the other where that is how they read."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.colours import LUMA, REACH, WIDTH, Column, Normalisation, colour, table

PLAIN = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # gives levels
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZE = 37  # not a multiple of anything


def nothing(count: int) -> Tensor:
    parameters = torch.zeros(count, len(Column))
    parameters[:, [Column.SATURATION, Column.CONTRAST, Column.BRIGHTNESS]] = 1
    return parameters


def problem(count: int = 6, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Smooth pictures with grey, black and white in them; parameters of which each crop has others."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 300 - 20
    crops = F.interpolate(coarse, size, mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    crops[:, :4, :4] = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)[None, None, :, None]
    draws = torch.rand(count, len(Column), generator=generator)
    parameters = draws.round()
    parameters[:, Column.HUE] = 72 * draws[:, Column.HUE] - 36
    parameters[:, Column.SATURATION : Column.SIGMA] = 0.6 + 0.8 * draws[:, Column.SATURATION : Column.SIGMA]
    parameters[:, Column.SIGMA] = 0.1 + 1.9 * draws[:, Column.SIGMA]
    parameters[0, [Column.HUE, Column.SIGMA]] = 0
    parameters[1, Column.SATURATION] = 0
    parameters[2, Column.SATURATION] = 1
    return crops, parameters


def coloured(crops, parameters, normalisation, hue, dtype, impl, device) -> Tensor:
    looked_up = table(parameters, hue).to(device)
    return colour(crops.to(device), looked_up, normalisation, dtype=dtype, impl=impl).cpu()


def whole(x: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(x + 0.5), 0, 255)


def turned_hue(x: np.ndarray, degrees: float) -> np.ndarray:
    def turn(pixel: np.ndarray) -> tuple[float, ...]:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
        return colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)

    return whole(255 * np.apply_along_axis(turn, -1, x)) if degrees else x


def yiq(x: np.ndarray, degrees: float, saturation: float) -> np.ndarray:
    if saturation == 1 and degrees == 0:
        return x
    if saturation == 0:
        return whole(np.repeat(x @ np.array(LUMA)[:, None], 3, -1))
    ntsc = np.array([LUMA, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
    c, s = saturation * np.cos(np.deg2rad(degrees)), saturation * np.sin(np.deg2rad(degrees))
    return whole(x @ (np.linalg.inv(ntsc) @ [[1, 0, 0], [0, c, s], [0, -s, c]] @ ntsc).T)


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0:
        return x
    kernel = np.exp(-(np.arange(-REACH, REACH + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(x, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, (0, 1))
    return whole(np.einsum("yxcij,ij->yxc", windows, kernel))


def levels(crop: Tensor, row: Tensor, hue: str) -> np.ndarray:
    """`[S, S, 3]`."""
    p = dict(zip(Column, row.double().tolist(), strict=True))
    x = crop.numpy().astype(float)
    x = x.transpose(1, 0, 2) if p[Column.TRANSPOSE] else x
    x = x[:, ::-1] if p[Column.MIRROR_X] else x
    x = x[::-1] if p[Column.MIRROR_Y] else x
    if hue == "hsv":
        x = yiq(turned_hue(x, p[Column.HUE]), 0, p[Column.SATURATION])
    else:
        x = yiq(x, p[Column.HUE], p[Column.SATURATION])
    centre = (x @ np.array(LUMA)).mean()
    x = whole(whole(centre + p[Column.CONTRAST] * (x - centre)) * p[Column.BRIGHTNESS])
    x = blurred(x, p[Column.SIGMA])
    return np.where((x >= 128) & bool(p[Column.SOLARIZE]), 255 - x, x)


@pytest.mark.parametrize("hue", ["yiq", "hsv"])
def test_levels_are_those_of_the_formulas(hue: str, impl: str, device: str) -> None:
    crops, parameters = problem()
    found = coloured(crops, parameters, PLAIN, hue, torch.float32, impl, device)
    for one, crop, row in zip(found, crops, parameters, strict=True):
        expected = torch.from_numpy(levels(crop, row, hue)).permute(2, 0, 1)
        difference = (one - expected).abs()
        assert difference.max() < 1.001  # of a level, where fp32 decides otherwise what a half is rounded to
        assert (difference > 0.5).double().mean() < 1e-3


def test_each_parameter_does_its_own_alone_and_none_changes_nothing(impl: str, device: str) -> None:
    crops, drawn = problem(1 + len(Column))
    parameters = nothing(len(crops))
    for column in Column:
        parameters[column, column] = drawn[1, column] if column < Column.SOLARIZE else 1
    found = coloured(crops, parameters, PLAIN, "yiq", torch.float32, impl, device)
    before = crops.permute(0, 3, 1, 2).float()
    assert ((found - before).abs() < 0.5).flatten(1).all(1).tolist() == [False] * len(Column) + [True]
    for one, crop, row in zip(found, crops, parameters, strict=True):
        expected = torch.from_numpy(levels(crop, row, "yiq")).permute(2, 0, 1)
        assert ((one - expected).abs() > 0.5).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_is_normalised_and_rounded_once(dtype: torch.dtype, impl: str, device: str) -> None:
    crops, parameters = problem(3, 2 * REACH)
    plain = coloured(crops, parameters, PLAIN, "yiq", torch.float32, impl, device).round()
    found = coloured(crops, parameters, IMAGENET, "yiq", dtype, impl, device)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in IMAGENET)
    expected = (plain.double() / 255 - mean) / std
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps  # values are below 3


@pytest.mark.parametrize(
    ("crops", "width", "what"),
    [
        (torch.zeros(2, 8, 8, 3), WIDTH, "expected uint8"),
        (torch.zeros(2, 8, 9, 3, dtype=torch.uint8), WIDTH, "crops"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), WIDTH, "more than 4 pixels"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 3, "table"),
    ],
)
def test_what_does_not_fit_is_refused(crops: Tensor, width: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        colour(crops, torch.zeros(2, width), PLAIN, dtype=torch.float32, impl="eager")


def test_parameters_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="hue='lab' is unknown"):
        table(nothing(2), "lab")
    with pytest.raises(ValueError, match=r"parameters: expected \[N, 9\]"):
        table(torch.zeros(2, 3), "yiq")
