"""The loss against factored targets, and the row and column reductions, against fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import distillation
from kernels.distillation import Targets, column_sum, cross_entropy, row_logsumexp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STUDENT_TEMPERATURE, TEMPERATURE = 0.1, 0.06
Check = Callable[..., None]


def random_problem(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], centred: bool = True
) -> tuple[Tensor, Targets, Tensor]:
    """Student `[R, K]`, normalised targets `[M, K]` and rows `[R, P]`, neighbours sharing targets where R > M."""
    r, m, k, p = shape
    generator = torch.Generator().manual_seed(r * 1000 + k)
    student = torch.rand(r, k, generator=generator).mul(2).sub(1).to(device, dtype)
    logits = torch.rand(m, k, generator=generator).mul(2).sub(1).to(device, dtype)
    col = torch.randn(k, generator=generator).to(device) if centred else None
    exponent = logits.double() / TEMPERATURE + (0 if col is None else col)
    row = -exponent.logsumexp(-1).float()
    first = torch.arange(r) * m // max(r, 1)
    rows = torch.stack([(first + i) % m for i in range(p)], 1).to(device)
    return student, Targets(logits, row, col, TEMPERATURE), rows


def reference(
    student: Tensor, targets: Targets, rows: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and gradient with every probability written out, computed in `dtype`, the gradient as autograd gives it."""
    leaf = student.detach().to(torch.float64 if dtype == torch.float64 else student.dtype).requires_grad_()
    exponent = targets.logits.to(dtype) / targets.temperature + targets.row.to(dtype)[:, None]
    p = (exponent if targets.col is None else exponent + targets.col.to(dtype)).exp()
    loss = -(p[rows].sum(1) * torch.log_softmax(leaf.to(dtype) / STUDENT_TEMPERATURE, -1)).sum(-1)
    (loss * weight.to(dtype)).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def compare(student: Tensor, targets: Targets, rows: Tensor, impl: str, earned: Check) -> None:
    weight = torch.linspace(0.5, 1.5, len(student), device=student.device)
    leaf = student.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, rows, STUDENT_TEMPERATURE, impl=impl)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), leaf)
    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    oracle = reference(student, targets, rows, weight, torch.float64)
    plain = reference(student, targets, rows, weight, torch.float32)
    scales = (student / STUDENT_TEMPERATURE, targets.logits / TEMPERATURE, targets.row)
    exponent = max(float(x.abs().max()) for x in scales)
    earned(loss.detach(), plain[0], oracle[0], exponent)
    # with one prototype the gradient is the sum of the targets less itself
    parts = float(weight.max()) * rows.shape[1] / STUDENT_TEMPERATURE if student.shape[1] == 1 else 0.0
    earned(gradient, plain[1], oracle[1], exponent, cancelled=parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (16, 4, 192, 2),  # 4 local crops meet the same 2 global crops
        (11, 4, 1031, 2),  # groups of 2 and 3: neighbours disagree
        (9, 2, 67, 3),
        (6, 6, 640, 1),
        (5, 7, 100, 1),
        (1, 1, 64, 1),
        (3, 2, 1, 2),  # one prototype
    ],
    ids=str,
)
def test_loss_and_gradient_match_fp64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, impl: str, device: str, earned: Check
) -> None:
    compare(*random_problem(device, dtype, shape), impl, earned)


def test_rows_longer_than_one_split(impl: str, device: str, earned: Check) -> None:
    compare(*random_problem(device, torch.bfloat16, (2, 1, 9001, 1)), impl, earned)


def test_targets_without_column_bias(impl: str, device: str, earned: Check) -> None:
    compare(*random_problem(device, torch.float16, (8, 4, 300, 2), centred=False), impl, earned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype: torch.dtype, impl: str, device: str, earned: Check) -> None:
    _, targets, rows = random_problem(device, dtype, (6, 3, 130, 2), centred=False)
    sign = torch.where(torch.arange(130, device=device) % 3 == 0, 1.0, -1.0)
    student = (sign * 80 * STUDENT_TEMPERATURE).expand(6, 130).to(dtype)
    logits = (sign.roll(1) * 80 * TEMPERATURE).expand(3, 130).to(dtype)
    row = -(logits.double() / TEMPERATURE).logsumexp(-1).float()
    compare(student.contiguous(), targets._replace(logits=logits.contiguous(), row=row), rows, impl, earned)


def test_identical_rows_have_identical_losses(impl: str, device: str, earned: Check) -> None:
    # torch on a GPU adds up a row that begins elsewhere within 16 bytes in another order
    prototypes = 256 if impl == "eager" and device == "cuda" else 257
    student, targets, _ = random_problem(device, torch.float32, (1, 1, prototypes, 1))
    rows = torch.zeros(7, 2, dtype=torch.int64, device=device)
    student = student.repeat(7, 1)
    compare(student, targets, rows, impl, earned)
    loss = cross_entropy(student, targets, rows, STUDENT_TEMPERATURE, impl=impl)
    assert (loss == loss[0]).all()


def test_targets_need_not_sum_to_one(impl: str, device: str, earned: Check) -> None:
    student, targets, rows = random_problem(device, torch.float32, (8, 2, 96, 2))
    compare(student, targets._replace(row=targets.row + torch.tensor([0.7, -1.1], device=device)), rows, impl, earned)


def test_loss_of_equal_distributions_is_their_entropy(impl: str, device: str) -> None:
    uniform = torch.zeros(2, 50, device=device)
    row = torch.full((2,), -math.log(50), device=device)
    rows = torch.tensor([[0], [1]], device=device)
    loss = cross_entropy(uniform, Targets(uniform, row, None, TEMPERATURE), rows, STUDENT_TEMPERATURE, impl=impl)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(50)))


def test_index_dtype_and_strides_do_not_matter(impl: str, device: str) -> None:
    student, targets, rows = random_problem(device, torch.float32, (8, 4, 90, 2))
    expected = cross_entropy(student, targets, rows, STUDENT_TEMPERATURE, impl=impl)
    wide = torch.full((8, 100), math.nan, device=device)
    wide[:, 3:93] = student
    turned = targets._replace(logits=targets.logits.t().contiguous().t())
    result = cross_entropy(wide[:, 3:93], turned, rows.int(), STUDENT_TEMPERATURE, impl=impl)
    assert torch.equal(result, expected)


def test_no_rows_give_no_losses(impl: str, device: str) -> None:
    student, targets, _ = random_problem(device, torch.float32, (4, 4, 70, 1))
    empty = student[:0].requires_grad_()
    rows = torch.zeros(0, 1, dtype=torch.int64, device=device)
    loss = cross_entropy(empty, targets, rows, STUDENT_TEMPERATURE, impl=impl)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert empty.grad is not None
    assert empty.grad.shape == (0, 70)


def test_gradient_may_take_the_place_of_the_logits(impl: str, device: str) -> None:
    student, targets, rows = random_problem(device, torch.bfloat16, (8, 2, 130, 2))
    leaf = student.clone().requires_grad_()
    cross_entropy(leaf, targets, rows, STUDENT_TEMPERATURE, impl=impl).sum().backward()
    root = student.clone().requires_grad_()
    logits = root * 1
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = cross_entropy(logits, targets, rows, STUDENT_TEMPERATURE, impl=impl, inplace_backward=True)
    loss.sum().backward(retain_graph=True)
    assert torch.equal(root.grad, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    if impl == "triton":
        assert seen == [logits.data_ptr()]


def test_rows_beyond_32_bit_offsets(impl: str, device: str) -> None:
    stride = 2**29 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GB of address space, a few pages of memory
    try:
        memory = torch.empty(4 * stride + 64, dtype=torch.bfloat16, device=device)
        student, targets, rows = random_problem(device, torch.bfloat16, (5, 5, 64, 1))
        far = memory.as_strided((5, 64), (stride, 1))
        far.copy_(student)
        results = []
        for x in (student.clone(), far):
            leaf, target = x.detach().requires_grad_(), targets._replace(logits=x.detach())
            loss = cross_entropy(leaf, target, rows, STUDENT_TEMPERATURE, impl=impl, inplace_backward=x is far)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            results.append((loss.detach(), gradient.clone()))
            x.copy_(student)
        for near, distant in zip(*results, strict=True):
            assert torch.equal(near, distant)
        assert torch.equal(column_sum(far, impl=impl), column_sum(student, impl=impl))
        assert torch.equal(row_logsumexp(far, 1.0, impl=impl), row_logsumexp(student, 1.0, impl=impl))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_eager_gradient_by_finite_differences(device: str) -> None:
    student, targets, rows = random_problem(device, torch.float32, (4, 2, 9, 2))
    assert torch.autograd.gradcheck(
        lambda s: cross_entropy(s, targets, rows, STUDENT_TEMPERATURE, impl="eager"),
        student.double().requires_grad_(),
    )


def test_eager_chunks_do_not_change_the_result(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, targets, rows = random_problem(device, torch.float32, (11, 4, 130, 2))
    whole = cross_entropy(student, targets, rows, STUDENT_TEMPERATURE, impl="eager")
    monkeypatch.setitem(distillation._CHUNK, device, 3 * 130)
    torch.testing.assert_close(cross_entropy(student, targets, rows, STUDENT_TEMPERATURE, impl="eager"), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 300), (1, 64), (3, 1), (67, 130), (2, 9000)], ids=str)
def test_reductions_match_fp64(
    shape: tuple[int, int], dtype: torch.dtype, impl: str, device: str, earned: Check
) -> None:
    m, k = shape
    logits = (torch.randn(m, k, generator=torch.Generator().manual_seed(k)) * 4).to(device, dtype)
    row, col = torch.linspace(-3, 3, m, device=device), torch.linspace(-9, 5, k, device=device)
    x64, x32 = logits.double(), logits.float()

    earned(row_logsumexp(logits, 0.05, impl=impl), (x32 / 0.05).logsumexp(1), (x64 / 0.05).logsumexp(1))
    earned(
        row_logsumexp(logits, 0.05, col, impl=impl), (x32 / 0.05 + col).logsumexp(1), (x64 / 0.05 + col).logsumexp(1)
    )
    if impl == "triton":
        from kernels.fused.reduce import column_logsumexp

        oracle = (x64 / 0.05 + row[:, None]).logsumexp(0)
        earned(column_logsumexp(logits, 0.05, row), (x32 / 0.05 + row[:, None]).logsumexp(0), oracle)
    earned(column_sum(logits, impl=impl), x32.sum(0), x64.sum(0))


def test_reductions_over_no_rows(impl: str, device: str) -> None:
    empty = torch.zeros(0, 70, dtype=torch.bfloat16, device=device)
    assert row_logsumexp(empty, 0.1, impl=impl).shape == (0,)
    assert torch.equal(column_sum(empty, impl=impl), torch.zeros(70, device=device))
    if impl == "triton":
        from kernels.fused.reduce import column_logsumexp

        assert (column_logsumexp(empty, 0.1, torch.zeros(0, device=device)) == -math.inf).all()


def test_wrong_shapes_are_refused_with_the_expected_ones(impl: str, device: str) -> None:
    student, targets, rows = random_problem(device, torch.float32, (4, 2, 70, 2))
    for broken, message in (
        ((student[:, :69], targets, rows), r"\[R, K\] and \[M, K\], got \[4, 69\] and \[2, 70\]"),
        ((student, targets, rows[:3]), r"expected \[4, P\] with P > 0, got \[3, 2\]"),
        ((student, targets, rows.float()), "int32 or int64, got torch.float32"),
        ((student, targets._replace(row=targets.row[:1]), rows), r"targets.row: expected \[2\], got \[1\]"),
        ((student, targets._replace(col=targets.row), rows), r"targets.col: expected \[70\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(*broken, STUDENT_TEMPERATURE, impl=impl)
