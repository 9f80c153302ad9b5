"""Stochastic depth that computes only what it keeps.

A residual branch runs on a random subset of the images of each crop group, and its output is scaled by B / kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.residual import add_rows, row_positions, take_rows
from pipeline.elastic.layers import ElasticLayerScale

Layout = tuple[tuple[int, ...], ...]  # per crop group: images, then rows and columns, or tokens, of each


class Kept(NamedTuple):
    """The packed tokens of the images that one residual branch keeps.

    Attributes:
        rows: `[R]` int64 rows of the packed tokens.
        positions: `[T]` int32, their inverse.
        layout: crop groups of the kept rows.
        scale: B / kept; a tensor `[R, 1]` where crop groups differ in it.
    """

    rows: Tensor
    positions: Tensor
    layout: Layout
    scale: float | Tensor


def kept_count(batch: int, rate: float) -> int:
    """Images that a branch keeps out of `batch` at drop rate `rate`: at least one."""
    return max(int(batch * (1 - rate)), 1)


def keep_indices(
    seed: int,
    step: int,
    rank: int,
    branch: int,
    rate: float,
    batch_sizes: Sequence[int],
    draws: int,
    device: torch.device | str,
) -> list[Tensor] | None:
    """Images kept by every residual branch of a forward pass.

    A pure function of (seed, step, rank, branch).

    Args:
        seed: of the run.
        step: optimizer step.
        rank: of this process.
        branch: number of the forward pass within the step (0 intact, 1 elastic).
        rate: probability of dropping an image, within [0, 1).
        batch_sizes: images of each crop group.
        draws: residual branches of the largest network, `Backbone.num_draws`.
        device: where the indices are wanted; one copy per crop group.

    Returns:
        Per crop group, int64 `[draws, kept]`, each row rising; None if nothing is dropped.
    """
    if rate == 0:
        return None
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, rank, branch])))
    indices = []
    for batch in batch_sizes:
        order = random.random((draws, batch), dtype=np.float32).argsort(axis=1)
        kept = np.sort(order[:, : kept_count(batch, rate)], axis=1)
        host = torch.from_numpy(kept)
        if torch.device(device).type == "cuda":
            host = host.pin_memory()
        indices.append(host.to(device, non_blocking=True))
    return indices


def kept_rows(keep: Sequence[Tensor] | None, layout: Layout) -> list[Kept] | None:
    """Rows of packed tokens for each draw of `keep`.

    Args:
        keep: per crop group, int64 `[draws, kept]` image indices.
        layout: crop groups of the packed tokens.
    """
    if keep is None:
        return None
    rows, counts, start = [], [], 0
    for kept, (batch, *sides) in zip(keep, layout, strict=True):
        tokens = int(np.prod(sides))
        within = torch.arange(start, start + tokens, device=kept.device)
        rows.append((kept[:, :, None] * tokens + within).flatten(1))
        counts.append(kept.shape[1])
        start += batch * tokens
    ratios = [batch / count for (batch, *_), count in zip(layout, counts, strict=True)]
    scale: float | Tensor = ratios[0]
    if len(set(ratios)) > 1:
        scale = torch.cat([torch.full((r.shape[1], 1), x, device=r.device) for r, x in zip(rows, ratios, strict=True)])
    kept_layout = tuple((count, *sides) for count, (_, *sides) in zip(counts, layout, strict=True))
    draws = torch.cat(rows, dim=1)
    return [Kept(*pair, kept_layout, scale) for pair in zip(draws, row_positions(draws, start), strict=True)]


def add_branch(
    x: Tensor,
    layout: Layout,
    branch: Callable[[Tensor, Layout], Tensor],
    kept: Kept | None,
    layer_scale: nn.Module | None = None,
    *,
    impl: str,
) -> Tensor:
    """x + layer_scale(branch(x)) over packed tokens `[T, C]`, the branch computed on the kept rows only."""
    if kept is None:
        out = branch(x, layout)
        return x + (out if layer_scale is None else layer_scale(out))
    x, taken = take_rows(x, kept.rows, kept.positions, impl=impl)
    out = branch(taken, kept.layout)
    add = partial(add_rows, x, out, kept.rows, kept.positions, kept.scale, impl=impl)
    if not isinstance(layer_scale, ElasticLayerScale):
        return add()
    parameters = layer_scale.sliced(x.shape[-1])
    with layer_scale.saving(parameters, x.shape[-1]):
        return add(parameters["gamma"])
