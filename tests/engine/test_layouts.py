"""The optimizer is torch's, whatever is taken off it."""

import torch

from pipeline.engine.layouts import AdamW


def test_adamw_without_wrappers_updates_like_torchs_own():
    def train(kind):
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(n, generator=generator).requires_grad_() for n in (7, 3)]
        optimizer = kind(
            [{"params": [w], "lr": lr} for w, lr in zip(weights, (0.1, 0.01), strict=True)], weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            sum((w - 1).square().sum() for w in weights).backward()
            optimizer.step()
        return weights, [optimizer.state[w] for w in weights]

    (ours, our_state), (theirs, their_state) = train(AdamW), train(torch.optim.AdamW)
    for a, b, mine, other in zip(ours, theirs, our_state, their_state, strict=True):
        assert torch.equal(a, b)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
