"""What lanes and pieces do to a large set that does not exist: what nodes fetch of it, and how batches are mixed."""

import itertools
from typing import Any

import numpy as np

from pipeline.data.order import WORTH, SampleOrder, cut, lanes_of, positions_of

_CLASSES = 100
_BATCHES = 8


def benchmark_order(
    gb: float, shard_mb: int, per_shard: int, nodes: list[int], pieces: list[int], batch: int, window: int
) -> dict[str, Any]:
    """Simulate an epoch for every number of nodes, with one lane, one for each node and eight for each.

    The classes stand one behind the other in the shards, as they do in a set that was packed without a shuffle.

    Args:
        gb: bytes of the set, in units of 2^30.
        shard_mb: of each shard, in units of 2^20.
        per_shard: samples of each.
        nodes: numbers of them.
        pieces: `data.piece_mb`.
        batch: global.
        window: `data.window`.

    Returns:
        `perfect`: the imbalance of a batch that is drawn at random from the whole set. `rows`: by nodes, lanes and
        pieces what the node that fetches most fetches in the first epoch, how much of it sample by sample, and what in
        the second, with a cache that holds all of it; and the imbalance: half of the sum over classes of the difference
        between their shares of a batch and of the set, 0 for equal and 1 for one class alone.
    """
    shards = round(gb * 1024 / shard_mb)
    rows = []
    for count, piece_mb in itertools.product(nodes, pieces):
        sizes = cut([shard_mb << 20] * shards, np.full(shards, per_shard), piece_mb)
        for lanes in sorted({1, count, 8 * count}):
            order = SampleOrder(sizes, window, seed=0, lanes=lanes)
            parts = max((_fetched(order, lanes_of(node, count, lanes)) for node in range(count)), key=sum)
            names = ("first_epoch_gb", "of_it_one_by_one_gb", "second_epoch_gb")
            fetched = {name: round(gb * part, 1) for name, part in zip(names, parts, strict=True)}
            row = {"nodes": count, "lanes": lanes, "piece_mb": piece_mb, "window_mb": window * (piece_mb or shard_mb)}
            rows.append(row | fetched | {"imbalance": round(_imbalance(order, batch), 3)})
    draws = np.random.default_rng(0).integers(_CLASSES, size=(_BATCHES, batch))
    return {"gb": gb, "shards": shards, "batch": batch, "perfect": round(_distance(draws), 3), "rows": rows}


def _fetched(order: SampleOrder, shares: dict[int, float]) -> tuple[float, float, float]:
    """Parts of the set that a node fetches: in the first epoch, of that sample by sample, and in the second. Pieces of
    which it reads most come as a whole, and stay."""
    first, second = (order.portions(epoch, shares) for epoch in range(2))
    kept = first >= WORTH
    single, again = first[~kept] @ order.sizes[~kept], second[~kept] @ order.sizes[~kept]
    return (
        float(order.sizes[kept].sum() + single) / order.samples,
        float(single) / order.samples,
        float(again) / order.samples,
    )


def _imbalance(order: SampleOrder, batch: int) -> float:
    starts = np.random.default_rng(0).integers(order.samples // batch, size=_BATCHES) * batch
    records = [[order(position) for position in positions_of(start, batch, 0, 1).tolist()] for start in starts.tolist()]
    return _distance(np.array(records) * _CLASSES // order.samples)


def _distance(classes: np.ndarray) -> float:
    counts = np.array([np.bincount(row, minlength=_CLASSES) for row in classes])
    return float(np.abs(counts / classes.shape[1] - 1 / _CLASSES).sum(axis=1).mean() / 2)
