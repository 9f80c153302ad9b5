import numpy as np
import pytest

from pipeline.data.masks import block_masks

GRID = (14, 14)


def masks(seed: int = 0, step: int = 0, rank: int = 0, crops: int = 128) -> np.ndarray:
    return block_masks(seed, step, rank, crops, GRID, 0.5, (0.1, 0.5))


def test_masks_are_a_pure_function_of_seed_step_and_rank() -> None:
    first = masks()
    masks(step=5)
    assert np.array_equal(masks(), first)
    for other in (masks(seed=1), masks(step=1), masks(rank=1)):
        assert not np.array_equal(other, first)


def test_half_of_the_crops_are_masked_and_shares_are_spread_evenly() -> None:
    for step in range(20):
        counts = masks(step=step).sum(1)
        masked = np.sort(counts[counts > 0])
        assert len(masked) == 64
        # the i-th share lies in the i-th of 64 equal parts of 0.1 to 0.5
        edges = 196 * (0.1 + 0.4 * np.arange(65) / 64)
        assert (masked >= np.floor(edges[:-1])).all()
        assert (masked <= edges[1:]).all()


def test_masked_crops_are_shuffled() -> None:
    places = np.mean([masks(step=step).any(1) for step in range(200)], axis=0)
    assert np.abs(places - 0.5).max() < 0.16  # 4.5 standard deviations
    counts = masks().sum(1)
    assert (np.diff(counts[counts > 0]) < 0).any()


def test_masks_are_blocks_rather_than_scattered_patches() -> None:
    """A masked patch's right neighbour is masked as well far more often than the share of masked patches."""
    neighbour, share = [], []
    for step in range(10):
        grid = masks(step=step).reshape(-1, *GRID)
        grid = grid[grid.any((1, 2))]
        neighbour.append((grid[:, :, :-1] & grid[:, :, 1:]).sum() / grid[:, :, :-1].sum())
        share.append(grid.mean())
    assert np.mean(share) == pytest.approx(0.3, abs=0.01)
    assert np.mean(neighbour) > 0.75


def plain_block_mask(generator: np.random.Generator, grid: tuple[int, int], wanted: int) -> np.ndarray:
    """One mask at a time, as BEiT describes it."""
    rows, cols = grid
    mask = np.zeros(grid, bool)
    failed = False
    while mask.sum() < wanted and not failed:
        left_over = wanted - mask.sum()
        failed = True
        for _ in range(10):
            area = 4 + (min(left_over, rows * cols / 2) - 4) * generator.random()
            aspect = np.exp(generator.uniform(np.log(0.3), -np.log(0.3)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < cols):
                continue
            top, left = generator.integers(rows - height + 1), generator.integers(cols - width + 1)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - block.sum() <= left_over:
                block[:] = True
                failed = False
                break
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (6, 20)])
def test_masks_are_distributed_like_those_of_a_plain_implementation(grid: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    wanted = int(0.3 * grid[0] * grid[1])
    plain = np.array([plain_block_mask(generator, grid, wanted) for _ in range(1500)])
    ours = np.concatenate([block_masks(0, step, 0, 150, grid, 1.0, (0.3, 0.3)) for step in range(10)]).reshape(
        -1, *grid
    )
    noise = np.sqrt(2 * 0.25 / 1500)
    assert np.abs(plain.mean(0) - ours.mean(0)).max() < 4.5 * noise
    for axis in (1, 2):
        changes = [np.diff(masks.astype(int), axis=axis).__abs__().mean() for masks in (plain, ours)]
        assert changes[0] == pytest.approx(changes[1], rel=0.04)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (4, 4), (3, 50), (37, 11)])
def test_any_grid_gets_exact_shares(grid: tuple[int, int]) -> None:
    counts = block_masks(0, 0, 0, 64, grid, 1.0, (0.25, 0.25)).sum(1)
    assert (counts == max(grid[0] * grid[1] // 4, 1)).all()


def test_nothing_is_masked_when_nothing_is_asked_for() -> None:
    assert block_masks(0, 0, 0, 0, GRID, 0.5, (0.1, 0.5)).shape == (0, 196)
    assert not block_masks(0, 0, 0, 8, GRID, 0.0, (0.1, 0.5)).any()
    assert not block_masks(0, 0, 0, 8, GRID, 1.0, (0.0, 0.0)).any()
    assert masks(crops=5).any(1).sum() == 2
