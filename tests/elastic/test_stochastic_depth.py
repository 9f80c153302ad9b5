import numpy as np
import pytest
import torch
from timm.models import create_model

from pipeline.elastic.stochastic_depth import add_branch, keep_indices, kept_count, kept_rows


def keep(**changes):
    arguments = {
        "seed": 0,
        "step": 5,
        "rank": 1,
        "branch": 0,
        "rate": 0.2,
        "batch_sizes": [10, 40],
        "draws": 48,
        "device": "cpu",
    }
    return keep_indices(**{**arguments, **changes})


@pytest.mark.parametrize(("batch", "rate", "kept"), [(10, 0.2, 8), (3, 0.2, 2), (1, 0.2, 1), (4, 0.9, 1), (5, 0, 5)])
def test_kept_images_are_those_of_the_design(batch, rate, kept):
    assert kept_count(batch, rate) == kept


def test_every_draw_keeps_distinct_images():
    for indices, batch, kept in zip(keep(), (10, 40), (8, 32), strict=True):
        assert indices.shape == (48, kept)
        assert indices.dtype == torch.int64
        assert ((indices[:, 1:] - indices[:, :-1]) > 0).all()
        assert indices.min() >= 0
        assert indices.max() < batch


@pytest.mark.parametrize("changed", ["seed", "step", "rank", "branch"])
def test_draws_are_a_function_of_seed_step_rank_and_branch(changed):
    assert all(torch.equal(a, b) for a, b in zip(keep(), keep(), strict=True))
    assert not torch.equal(keep()[1], keep(**{changed: 7})[1])


def test_every_image_is_dropped_equally_often():
    counts = np.bincount(keep(draws=4000, batch_sizes=[5], rate=0.4)[0].flatten(), minlength=5)
    assert np.abs(counts / 4000 - 0.6).max() < 5 * (0.6 * 0.4 / 4000) ** 0.5


def test_draws_differ_between_branches_of_a_network():
    rows = keep()[1]
    assert len({tuple(row.tolist()) for row in rows}) == 48


def test_nothing_is_drawn_at_rate_zero():
    assert keep(rate=0) is None


@pytest.mark.parametrize("batches", [(4, 8), (3, 8)], ids=["same ratio", "ratios differ"])
def test_branch_runs_on_kept_images_scaled_by_the_kept_fraction(batches):
    """Against the definition: zero the branch of dropped images, multiply the others by B / kept."""
    sides = ((3,), (2, 2))
    layout = tuple((b, *side) for b, side in zip(batches, sides, strict=True))
    indices = keep(batch_sizes=list(batches), draws=2, rate=0.25)
    tokens = [3, 4]
    x = torch.randn(sum(b * n for b, n in zip(batches, tokens, strict=True)), 5, dtype=torch.double)
    factors = []
    for b, n, kept in zip(batches, tokens, indices, strict=True):
        factor = torch.zeros(b, dtype=torch.double)
        factor[kept[1]] = b / kept.shape[1]
        factors.append(factor.repeat_interleave(n))
    expected = x + x.sin() * torch.cat(factors)[:, None]
    seen = []

    def branch(rows, rows_layout):
        seen.append((rows.shape[0], rows_layout))
        return rows.sin()

    result = add_branch(x, layout, branch, kept_rows(indices, layout)[1], impl="eager")
    torch.testing.assert_close(result, expected)
    kept_layout = tuple((i.shape[1], *side) for i, side in zip(indices, sides, strict=True))
    assert seen == [(sum(i.shape[1] * n for i, n in zip(indices, tokens, strict=True)), kept_layout)]


class Chosen(torch.nn.Module):
    """In the place of timm's DropPath: keeps the given images, scaled by B / kept."""

    def __init__(self, batch, kept):
        super().__init__()
        self.factor = torch.zeros(batch)
        self.factor[kept] = batch / len(kept)

    def forward(self, x):
        return x * self.factor.view(-1, *[1] * (x.ndim - 1))


def residual_branches(model, family):
    """(block, attribute) of every DropPath of a timm model in the order of the draws."""
    if family == "resnet":
        return [(block, "drop_path") for stage in range(1, 5) for block in getattr(model, f"layer{stage}")]
    blocks = model.blocks if family == "vit" else [block for stage in model.layers for block in stage.blocks]
    return [(block, name) for block in blocks for name in ("drop_path1", "drop_path2")]


def test_blocks_drop_what_timm_drop_path_would(family, backbone):
    """timm's own model, its DropPath replaced by the same choice of images, gives the same features."""
    theirs = create_model(backbone.architecture, **backbone.model_args(backbone.grid.largest)).eval()
    theirs.load_state_dict(backbone.timm_state_dict())
    images = torch.randn(5, 3, backbone.config.image_size, backbone.config.image_size)
    (indices,) = keep(batch_sizes=[5], draws=backbone.num_draws, rate=0.4)
    for kept, (block, name) in zip(indices, residual_branches(theirs, family), strict=True):
        setattr(block, name, Chosen(5, kept))
    with torch.inference_mode():
        ours = backbone.forward_crops([images], backbone.grid.largest, keep=[indices])[0].cls
        torch.testing.assert_close(ours, theirs(images), rtol=1e-5, atol=1e-5)


def test_a_subnet_takes_the_draws_of_the_blocks_it_keeps(backbone):
    """So the same images are dropped in a block whatever sub-network runs: draws of other blocks change nothing."""
    subnet = backbone.grid.smallest
    images = torch.randn(5, 3, backbone.config.image_size, backbone.config.image_size)
    (indices,) = keep(batch_sizes=[5], draws=backbone.num_draws, rate=0.4)
    used = [block for block in backbone.elastic_blocks() if _runs(backbone, block, images, subnet)]
    per_block = backbone.num_draws // len(backbone.elastic_blocks())
    other = keep(batch_sizes=[5], draws=backbone.num_draws, rate=0.4, seed=1)[0]
    for i, block in enumerate(backbone.elastic_blocks()):
        if any(block is kept for kept in used):
            draws = slice(i * per_block, (i + 1) * per_block)
            other[draws] = indices[draws]
    assert 0 < len(used) < len(backbone.elastic_blocks())
    with torch.inference_mode():
        a, b = (backbone.forward_crops([images], subnet, keep=[k])[0].cls for k in (indices, other))
    assert torch.equal(a, b)


def _runs(backbone, block, images, subnet) -> bool:
    calls = []
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        backbone(images[:1], subnet)
    hook.remove()
    return bool(calls)
