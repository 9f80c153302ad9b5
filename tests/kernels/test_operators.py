"""The kernels as PyTorch operators: schemas, fake tensors, torch.compile and activation checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.distillation import Targets, cross_entropy, row_logsumexp
from kernels.residual import add_rows, row_positions, take_rows


def problem(device: str) -> tuple[Tensor, Targets, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, logits = (torch.rand(n, 70, generator=generator).to(device) for n in (8, 4))
    row = -(logits / 0.06).logsumexp(-1)
    rows = (torch.arange(8, device=device) // 2)[:, None]
    return student, Targets(logits, row, None, 0.06), rows


def test_operators_keep_pytorchs_rules(triton: str, device: str) -> None:
    """Schemas, autograd registration, fake tensors and tracing with symbolic shapes."""
    from kernels.fused import attention as fused_attention
    from kernels.fused import distillation, reduce
    from kernels.fused.residual import add_rows as fused_add_rows

    student, targets, rows = problem(device)
    logits, row, col = targets.logits, targets.row, torch.zeros(70, device=device)
    leaf = student.clone().requires_grad_()
    qkv = torch.randn(4, 9, 3, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(2, 9, 9, device=device, requires_grad=True)
    mask = torch.zeros(2, 9, 9, device=device)
    x, branch = (torch.randn(n, 24, device=device, requires_grad=True) for n in (8, 3))
    kept = torch.tensor([0, 3, 7], device=device)
    gamma = torch.randn(24, device=device, requires_grad=True)
    factors = torch.full((3, 1), 1.5, device=device)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (distillation.cross_entropy, (leaf, logits, row, col, rows, 0.1, 0.06, False)),
        (distillation.cross_entropy, (leaf, logits, row, None, rows, 0.1, 0.06, False)),
        (reduce.row_logsumexp, (logits, 0.06, col)),
        (reduce.column_logsumexp, (logits, 0.06, row)),
        (reduce.column_sum, (logits,)),
        (fused_attention.attention, (qkv, bias, mask)),
        (fused_attention.attention, (qkv, None, None)),
        (fused_add_rows, (x, branch, kept, row_positions(kept, 8), gamma, factors, 1.0)),
        (fused_add_rows, (x, branch, kept, row_positions(kept, 8), None, None, 1.5)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)


def test_compiled_loss_is_one_graph_with_the_same_gradient(triton: str, device: str) -> None:
    student, targets, rows = problem(device)

    def loss(leaf: Tensor) -> Tensor:
        row = -row_logsumexp(targets.logits, targets.temperature, impl=triton)
        return cross_entropy(leaf * 2, targets._replace(row=row), rows, 0.1, impl=triton).mean()

    leaves = [student.clone().requires_grad_() for _ in range(2)]
    plain = loss(leaves[0])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[1])
    plain.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_within_checkpoint_and_compile(compiled: bool, impl: str, device: str) -> None:
    """A checkpointed body recomputes the same values, compiled as one graph or not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 3 * 32, generator=generator).to(device)
    bias = torch.randn(2, 9, 9, generator=generator).to(device)

    def body(tokens: Tensor, offset: Tensor) -> Tensor:
        return attention((tokens * 1.5).view(2, 9, 3, 2, 16), bias=offset * 2, impl=impl).sin()

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    run = torch.compile(body, backend="aot_eager", fullgraph=True) if compiled else body
    result = gradients(lambda *leaves: checkpoint(run, *leaves, use_reentrant=False))
    for one, other in zip(result, gradients(body), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_branch_of_some_rows_within_checkpoint_and_compile(impl: str, device: str) -> None:
    """Its rows are taken and its result is added in one graph, also where the body is computed again."""
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 24, generator=generator).to(device) for n in (8, 24))
    rows = torch.tensor([0, 3, 7], device=device)
    positions = row_positions(rows, 8)

    def body(x: Tensor, weight: Tensor) -> Tensor:
        x, taken = take_rows(x, rows, positions, impl=impl)
        return add_rows(x, (taken @ weight).sin(), rows, positions, 1.5, impl=impl)

    def by_autograd(x: Tensor, weight: Tensor) -> Tensor:
        return x.index_add(0, rows, (x[rows] @ weight).sin(), alpha=1.5)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    for run in (body, compiled, lambda *leaves: checkpoint(compiled, *leaves, use_reentrant=False)):
        for one, other in zip(gradients(run), gradients(by_autograd), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
