"""What the hierarchical families share: patch tokens and masks on twice the grid of the last map."""

import torch
from torch import Tensor

SPREAD = 2  # patch tokens per side of one position of the last map
MASK_CELL = 4  # positions of the first map per side of one mask cell: the maps shrink by 8 in all


def spread(last_map: Tensor) -> Tensor:
    """`[B, H, W, D]` -> `[B, 2H * 2W, D]`: every position is the token of 2 x 2 patches."""
    return last_map.repeat_interleave(SPREAD, dim=1).repeat_interleave(SPREAD, dim=2).flatten(1, 2)


def mask_grid(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of patch tokens for images of these sides, `stride` pixels per position of the last map.

    Raises:
        ValueError: a side is not divisible by `stride`.
    """
    if height % stride or width % stride:
        raise ValueError(f"images: expected sides divisible by {stride}, got {height}x{width}")
    return height // stride * SPREAD, width // stride * SPREAD


def put_mask_token(first_map: Tensor, mask: Tensor, token: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace masked cells of the first map `[B, H, W, C]`.

    Args:
        first_map: output of the patch embedding or stem.
        mask: bool `[B, rows * cols]` over `grid`.
        token: `[1, C]`.
        grid: (rows, cols), each a quarter of the map's.
    """
    cells = mask.view(-1, *grid).repeat_interleave(MASK_CELL, dim=1).repeat_interleave(MASK_CELL, dim=2)
    return torch.where(cells[..., None], token.to(first_map.dtype), first_map)
