"""What a step is made of."""

import pytest
import torch

from pipeline.config import parse_config
from pipeline.method.losses import Centering, Logits
from pipeline.run.step import build_student


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_attention_and_residual_have_their_own_implementation(experiment, family):
    sizes = {"head_dim": 16, "width": {"min": 16, "max": 32, "step": 16}}
    tree = experiment(family, engine={"kernels": {"attention": "triton", "residual": "eager"}}, model=sizes)
    for block in build_student(parse_config(tree)).backbone.elastic_blocks():
        assert (block.attn.impl, block.residual) == ("triton", "eager")


def test_sinkhorn_has_an_implementation_apart_from_the_losses():
    logits = Logits([], [torch.randn(4, 8)], [torch.randn(3, 8)])
    device = torch.device("cpu")
    assert (
        Centering("sinkhorn", [8], device, "triton", sinkhorn_impl="eager").targets(logits, 0.07).cls[0].row.ndim == 1
    )
    with pytest.raises(ValueError, match="impl='triton' got a tensor on cpu"):
        Centering("sinkhorn", [8], device, "eager", sinkhorn_impl="triton").targets(logits, 0.07)
