"""iBOT block masks (BEiT, section 2.3; spread over the batch as in DINOv2): a pure function of (seed, step, rank)."""

import numpy as np

from pipeline.data.philox import Purpose, philox

_TRIES = 10  # for the place of one block
_MIN_BLOCK = 4  # patches
_ASPECT = 0.3  # of a block, down to this and up to its inverse


def block_masks(
    seed: int,
    step: int,
    rank: int,
    crops: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
) -> np.ndarray:
    """Which patches of which crops are masked.

    `int(crops * probability)` crops are masked. The i-th of n gets a share drawn from the i-th of n equal parts of
    `ratio`; then the crops are shuffled. Rectangles are placed until the share is reached. What no rectangle can fill
    (all of it on a tiny grid) is filled with single patches, so the share is exact to a patch, and at least one.

    Args:
        grid: rows and columns of patches.
        ratio: smallest and largest share of masked patches.

    Returns:
        bool `[crops, rows * cols]`, patches in row-major order.
    """
    generator = philox(seed, Purpose.MASKS, step, rank)
    patches = grid[0] * grid[1]
    masked = int(crops * probability)
    masks = np.zeros((crops, *grid), bool)
    if masked and ratio[1] > 0:
        low, high = ratio
        shares = low + (high - low) * (np.arange(masked) + generator.random(masked)) / masked
        wanted = np.maximum((patches * shares).astype(int), 1)
        _place_blocks(masks[:masked], wanted, generator)
        _fill_up(masks[:masked].reshape(masked, patches), wanted, generator)
    return generator.permutation(masks.reshape(crops, patches))


def _place_blocks(masks: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> None:
    """Add one block to every crop at a time, until each is full or fails `_TRIES` times; in place."""
    rows, cols = masks.shape[1:]
    active = np.arange(len(masks))
    while len(active):
        current = masks[active]
        missing = wanted[active] - current.sum((1, 2))
        top, left, height, width = _candidates(
            len(active), np.minimum(missing, rows * cols / 2), (rows, cols), generator
        )
        added = height * width - _count(current, top, left, height, width)
        good = (height > 0) & (width > 0) & (height < rows) & (width < cols)
        good &= (added > 0) & (added <= missing[:, None])
        first = good.argmax(1)[:, None]
        found = good.any(1)
        top, left, height, width = (np.take_along_axis(a, first, 1)[found, :, None] for a in (top, left, height, width))
        active = active[found]
        in_rows = (np.arange(rows)[:, None] >= top) & (np.arange(rows)[:, None] < top + height)
        in_cols = (np.arange(cols) >= left) & (np.arange(cols) < left + width)
        masks[active] |= in_rows & in_cols
        active = active[masks[active].sum((1, 2)) < wanted[active]]


def _candidates(
    crops: int, largest: np.ndarray, grid: tuple[int, int], generator: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Top, left, height and width of random rectangles, int `[crops, _TRIES]`; some are larger than the grid."""
    draws = generator.random((4, crops, _TRIES))
    area = _MIN_BLOCK + (largest[:, None] - _MIN_BLOCK) * draws[0]
    root = np.sqrt(np.maximum(area, 0))
    stretch = np.exp(np.log(_ASPECT) * (draws[1] - 0.5))  # square root of the aspect ratio
    height, width = (np.rint(side).astype(int) for side in (root * stretch, root / stretch))
    top, left = (
        (draw * np.maximum(whole - side + 1, 1)).astype(int)
        for draw, whole, side in ((draws[2], grid[0], height), (draws[3], grid[1], width))
    )
    return top, left, height, width


def _count(masks: np.ndarray, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Masked patches inside each rectangle, by a summed-area table."""
    rows, cols = masks.shape[1:]
    table = np.zeros((len(masks), rows + 1, cols + 1), int)
    table[:, 1:, 1:] = masks.cumsum(1).cumsum(2)
    bottom, right = np.minimum(top + height, rows), np.minimum(left + width, cols)
    i = np.arange(len(masks))[:, None]
    return table[i, bottom, right] - table[i, top, right] - table[i, bottom, left] + table[i, top, left]


def _fill_up(masks: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> None:
    """Mask single patches at random where blocks did not reach what is wanted; in place."""
    missing = wanted - masks.sum(1)
    short = np.flatnonzero(missing)
    order = np.argsort(generator.random((len(short), masks.shape[1])) + masks[short], axis=1)  # free patches first
    for row, patches, count in zip(short, order, missing[short], strict=True):
        masks[row, patches[:count]] = True
