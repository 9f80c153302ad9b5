"""Gradients of two passes on their way to a shard, on one rank; several are in test_three_steps and test_counts."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.engine.gradients import Reduction

SMALL = 2.0**-9  # below what bf16 tells from 1 beside it


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def after_two_passes(precision: torch.dtype, reduced: torch.dtype, every_pass: bool = False) -> list[torch.Tensor]:
    """Of parameters of 2, 3 (never used) and 1 elements; the first pass gives 1 everywhere, the second `SMALL`."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=precision)) for shape in ((1, 2), (3,), (1,))]
    reduction = Reduction(parameters, 8, reduced, every_pass)
    for last, slope in ((False, 1.0), (True, SMALL)):
        ((parameters[0].sum() + parameters[2].sum()) * slope).backward()
        reduction.after_pass(last)
    reduction.finish()
    found = [gradient.clone() for gradient in reduction.gradients()]
    reduction.forget()
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(gradient.any() for gradient in reduction.gradients())
    return found


@pytest.mark.parametrize("every_pass", [False, True])
@pytest.mark.parametrize(
    ("precision", "reduced", "total"),
    [
        (torch.float32, torch.float32, 1 + SMALL),
        (torch.bfloat16, torch.float32, 1 + SMALL),
        (torch.bfloat16, torch.bfloat16, 1.0),
        (torch.float32, torch.bfloat16, 1 + SMALL),  # rounded for the way to other ranks alone
    ],
)
def test_passes_add_up_in_the_wider_precision(precision, reduced, total, every_pass):
    joined = torch.cat(after_two_passes(precision, reduced, every_pass)).float()
    assert joined[:6].tolist() == [total, total, 0, 0, 0, total]
    assert not joined[6:].any()  # padding, if it is there


def test_one_rank_copies_no_gradient_that_autograd_has_added_up():
    assert [len(gradient) for gradient in after_two_passes(torch.float32, torch.float32)] == [2, 3, 1]
    assert [len(gradient) for gradient in after_two_passes(torch.bfloat16, torch.float32)] == [8]
