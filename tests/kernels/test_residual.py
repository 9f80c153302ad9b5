"""LayerScale, residual and the scatter of stochastic depth in one operation."""

import pytest
import torch
from torch import Tensor

from kernels.residual import add_rows, row_positions, take_rows
from tests.kernels.conftest import Check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, kept rows, channels: one of each, ragged, wider than a block, all rows kept
SHAPES = [(1, 1, 1), (5, 1, 7), (37, 20, 96), (9, 6, 1100), (8, 8, 16)]


def problem(t: int, r: int, c: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(t * 31 + c)
    x, branch, grad = (torch.randn(n, c, generator=generator).to(device, dtype) for n in (t, r, t))
    gamma = torch.randn(c, generator=generator).to(device, dtype)
    rows = torch.randperm(t, generator=generator)[:r].sort().values.to(device)
    return x, branch, rows, gamma, grad


def written_out(x: Tensor, branch: Tensor, rows: Tensor, factor: float | Tensor, gamma: Tensor | None) -> Tensor:
    """Row by row with a matrix that puts rows where they belong."""
    place = torch.zeros(len(x), len(rows), dtype=x.dtype, device=x.device)
    place[rows, torch.arange(len(rows), device=x.device)] = 1
    added = branch if gamma is None else branch * gamma
    return x + place @ (added * (factor.to(x.dtype) if isinstance(factor, Tensor) else factor))


def results(function, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("t", "r", "c"), SHAPES)
def test_output_and_gradients_match_fp64(
    t: int, r: int, c: int, scaled: bool, per_row: bool, dtype: torch.dtype, impl: str, device: str, earned: Check
) -> None:
    x, branch, rows, gamma, grad = problem(t, r, c, dtype, device)
    factor = torch.linspace(1.1, 1.6, r, device=device)[:, None] if per_row else 1.25
    positions = row_positions(rows, t)
    leaves = [x, branch, gamma] if scaled else [x, branch]

    def ours(x: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensor:
        return add_rows(x, branch, rows, positions, factor, gamma, impl=impl)

    def oracle(x: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensor:
        return written_out(x, branch, rows, factor, gamma)

    found = results(ours, leaves, grad)
    plain = results(oracle, leaves, grad)
    exact = results(oracle, [leaf.double() for leaf in leaves], grad.double())
    for one, lowered, wanted, leaf in zip(found, plain, exact, [x, *leaves], strict=True):
        assert one.dtype == leaf.dtype
        earned(one, lowered, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "r", "c"), SHAPES)
def test_gradient_of_rows_taken_and_of_all_that_passes_by_are_one_sum(
    t: int, r: int, c: int, dtype: torch.dtype, impl: str, device: str
) -> None:
    x, branch, rows, _, grad = problem(t, r, c, dtype, device)
    x.requires_grad_()
    whole, taken = take_rows(x, rows, row_positions(rows, t), impl=impl)
    assert torch.equal(whole, x)
    assert torch.equal(taken, x[rows])
    (found,) = torch.autograd.grad([whole, taken], x, [grad, branch])
    expected = grad.float()
    expected[rows] += branch.float()
    assert found.dtype == dtype
    if dtype == torch.float32 or impl == "eager":
        assert torch.equal(found, expected.to(dtype))  # one addition per element, whoever makes it
    else:
        torch.testing.assert_close(found, expected.to(dtype))  # the interpreter truncates


def test_rows_left_out_keep_their_bits(impl: str, device: str) -> None:
    x, branch, rows, gamma, _ = problem(37, 20, 96, torch.bfloat16, device)
    out = add_rows(x, branch, rows, row_positions(rows, 37), 1.5, gamma, impl=impl)
    others = torch.ones(37, dtype=torch.bool, device=device)
    others[rows] = False
    assert torch.equal(out[others], x[others])
    assert not torch.equal(out[rows], x[rows])


def test_no_rows_add_nothing(impl: str, device: str) -> None:
    x, branch, rows, gamma, grad = problem(6, 0, 24, torch.float32, device)

    def ours(*leaves: Tensor) -> Tensor:
        return add_rows(*leaves[:2], rows, row_positions(rows, 6), 1.5, leaves[2], impl=impl)

    out, grad_x, grad_branch, grad_gamma = results(ours, [x, branch, gamma], grad)
    assert torch.equal(out, x)
    assert torch.equal(grad_x, grad)
    assert grad_branch.shape == (0, 24)
    assert not grad_gamma.any()


def test_strided_tensors_give_the_same(impl: str, device: str) -> None:
    x, branch, rows, gamma, grad = problem(12, 5, 40, torch.float32, device)
    positions = row_positions(rows, 12)

    def ours(*leaves: Tensor) -> Tensor:
        return add_rows(*leaves[:2], rows, positions, 1.5, leaves[2], impl=impl)

    def strided(*leaves: Tensor) -> Tensor:
        return ours(*(leaf.t().contiguous().t() for leaf in leaves[:2]), leaves[2])

    packed = results(ours, [x, branch, gamma], grad)
    for one, other in zip(results(strided, [x, branch, gamma], grad.t().contiguous().t()), packed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_positions_invert_rows_of_every_draw() -> None:
    rows = torch.tensor([[1, 2, 4], [0, 3, 4]])
    expected = torch.tensor([[-1, 0, 1, -1, 2], [0, -1, -1, 1, 2]], dtype=torch.int32)
    assert torch.equal(row_positions(rows, 5), expected)


def test_wrong_shapes_are_refused(impl: str, device: str) -> None:
    x, branch, rows, gamma, _ = problem(12, 5, 40, torch.float32, device)
    positions = row_positions(rows, 12)
    with pytest.raises(ValueError, match=r"branch: expected \[5, 40\], got \[4, 40\]"):
        add_rows(x, branch[:4], rows, positions, 1.0, impl=impl)
    with pytest.raises(ValueError, match=r"positions: expected \[12\], got \[11\]"):
        add_rows(x, branch, rows, positions[1:], 1.0, impl=impl)
    with pytest.raises(ValueError, match=r"factor: expected \[5, 1\], got \[5\]"):
        add_rows(x, branch, rows, positions, torch.ones(5, device=device), impl=impl)
    with pytest.raises(ValueError, match=r"gamma: expected \[40\], got \[39\]"):
        add_rows(x, branch, rows, positions, 1.0, gamma[1:], impl=impl)
