"""Geometry of Swin's windows for maps of any size, as timm lays them out for a model built for that size."""

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import get_relative_position_index, window_partition, window_reverse
from torch import Tensor
from torch.nn.functional import pad

BLOCKED = -100.0  # additive mask between positions that are neighbours only through the cyclic shift


class Windows(NamedTuple):
    """Windows of one map size.

    Attributes:
        size: rows and columns of a window: those of the map where it is smaller than a full window.
        shift: cyclic shift of odd blocks; 0 along a side that one window spans.
        mask: `[W, N, N]` additive mask of shifted windows; None without shift.
        rows: `[N * N]` rows of the (resized) bias table.
        resize: `[R', R]` interpolation of a bias table to windows of another size; None where it fits.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    mask: Tensor | None
    rows: Tensor
    resize: Tensor | None


@lru_cache(maxsize=64)
def windows(height: int, width: int, full: int, table: int, device: torch.device) -> Windows:
    """Windows on a map of `height` x `width`.

    Args:
        height: rows of the map.
        width: columns of the map.
        full: side of a full window.
        table: side of the windows that the bias tables are laid out for.
        device: where the tensors are wanted.
    """
    size = (min(height, full), min(width, full))
    shift = (full // 2 if height > full else 0, full // 2 if width > full else 0)
    with torch.inference_mode(False), torch.no_grad():
        mask = _shift_mask(height, width, size, shift).to(device) if any(shift) else None
        rows = get_relative_position_index(*size).flatten().to(device)
        resize = None if size == (table, table) else _table_resize(size, table).to(device)
    return Windows(size, shift, mask, rows, resize)


def _shift_mask(height: int, width: int, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Positions of a window attend to each other only within one region of the unshifted map."""
    rows, cols = (_regions(side, w, s) for side, w, s in zip((height, width), size, shift, strict=True))
    region = (rows[:, None] * 3 + cols[None, :])[None, :, :, None]
    region = window_partition(region, size).flatten(1)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, BLOCKED)


def _regions(side: int, window: int, shift: int) -> Tensor:
    """Region of each position along one (padded) side: inner windows, last window, wrapped part of the last window."""
    padded = -(-side // window) * window
    at = torch.arange(padded)
    return torch.zeros_like(at) if shift == 0 else (at >= padded - window).int() + (at >= padded - shift).int()


def _table_resize(size: tuple[int, int], table: int) -> Tensor:
    """timm's interpolation of a bias table as a matrix; it is linear, so its action on the identity is all of it."""
    columns = (2 * table - 1) ** 2
    shape = ((2 * size[0] - 1) * (2 * size[1] - 1), columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's indexing is of a kind that torch will drop
        return resize_rel_pos_bias_table(torch.eye(columns), size, shape)


def to_windows(x: Tensor, geometry: Windows, shifted: bool) -> Tensor:
    """Map `[B, H, W, C]` -> tokens `[B * windows * N, C]`, shifted and padded with zeros to whole windows."""
    if shifted and any(geometry.shift):
        x = torch.roll(x, shifts=(-geometry.shift[0], -geometry.shift[1]), dims=(1, 2))
    rows, cols = geometry.size
    x = pad(x, (0, 0, 0, -x.shape[2] % cols, 0, -x.shape[1] % rows))
    return window_partition(x, geometry.size).flatten(0, 2)


def from_windows(x: Tensor, height: int, width: int, geometry: Windows, shifted: bool) -> Tensor:
    """The inverse of `to_windows`: `[B * windows * N, C]` -> `[B, height, width, C]`."""
    rows, cols = geometry.size
    padded = height + -height % rows, width + -width % cols
    x = window_reverse(x.view(-1, rows, cols, x.shape[-1]), geometry.size, *padded)[:, :height, :width]
    if shifted and any(geometry.shift):
        x = torch.roll(x, shifts=geometry.shift, dims=(1, 2))
    return x
