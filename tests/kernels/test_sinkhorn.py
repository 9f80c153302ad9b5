"""Sinkhorn-Knopp as vector scalings against the matrix form, on one process and over ranks."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.sinkhorn import sinkhorn

TEMPERATURE = 0.06
RANKS = Path(__file__).with_name("sinkhorn_ranks.py")


def matrix_form(logits: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Targets `[B, K]` by normalising a whole matrix: columns to 1 / K, rows to 1 / B, in the log domain."""
    b, k = logits.shape
    log_q = logits.to(dtype) / TEMPERATURE
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - math.log(k)
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - math.log(b)
    return (log_q + math.log(b)).exp()


def probabilities(logits: Tensor, row: Tensor, col: Tensor) -> Tensor:
    assert row.dtype == col.dtype == torch.float32
    return (logits.double() / TEMPERATURE + row.double()[:, None] + col.double()).exp()


def cosines(rows: int, prototypes: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + prototypes)
    return (torch.rand(rows, prototypes, generator=generator) * 2 - 1).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("iterations", "length"), [(1, 1), (3, 1), (3, 6)])
def test_targets_equal_the_matrix_form(
    iterations: int, length: int, dtype: torch.dtype, impl: str, device: str, earned: Callable[..., None]
) -> None:
    """Of cosines, and of logits whose prototypes have learned a length: exponents of +-100 that fp32 does not hold."""
    entries = [cosines(*shape, dtype, device) * length for shape in ((9, 130), (1, 64), (17, 1), (5, 600))]
    scalings = sinkhorn(entries, TEMPERATURE, iterations, impl=impl)
    assert len(scalings) == len(entries)
    for logits, (row, col) in zip(entries, scalings, strict=True):
        result = probabilities(logits, row, col).float()
        oracle = matrix_form(logits, iterations, torch.float64)
        exponent = float(max(row.abs().max(), col.abs().max(), length / TEMPERATURE))
        terms = 2 * iterations * max(logits.shape)  # two sums per iteration follow one another
        earned(result, matrix_form(logits, iterations, torch.float32), oracle, exponent, terms)


def test_rows_sum_to_one_and_prototypes_are_used_equally(impl: str, device: str) -> None:
    logits = cosines(24, 8, torch.float32, device) * 0.3
    ((row, col),) = sinkhorn([logits], TEMPERATURE, 15, impl=impl)
    p = probabilities(logits, row, col)
    torch.testing.assert_close(p.sum(1), torch.ones(24, dtype=torch.float64, device=device), rtol=0, atol=1e-5)
    torch.testing.assert_close(p.sum(0), torch.full((8,), 3.0, dtype=torch.float64, device=device), rtol=0, atol=1e-2)


def test_scalings_are_normalised_by_all_rows(impl: str, device: str) -> None:
    """One iteration by hand: u = 1 / (K sum_b E v) with v = 1 / B, then row = log(1 / sum_k E u)."""
    logits = torch.tensor([[0.0, math.log(3)], [math.log(2), 0.0]], device=device)
    ((row, col),) = sinkhorn([logits], 1.0, 1, impl=impl)
    torch.testing.assert_close(col.exp(), torch.tensor([2 / (2 * 3.0), 2 / (2 * 4.0)], device=device))
    torch.testing.assert_close(row.exp(), torch.tensor([1 / (1 / 3 + 3 / 4), 1 / (2 / 3 + 1 / 4)], device=device))


def test_extreme_logits(impl: str, device: str, earned: Callable[..., None]) -> None:
    sign = torch.where(torch.arange(7 * 90).view(7, 90) % 11 < 5, 1.0, -1.0)
    logits = (sign * 80 * TEMPERATURE).to(device)
    ((row, col),) = sinkhorn([logits], TEMPERATURE, impl=impl)
    oracle = matrix_form(logits, 3, torch.float64)
    earned(probabilities(logits, row, col).float(), matrix_form(logits, 3, torch.float32), oracle, 160)


def test_identical_rows_share_the_prototypes(impl: str, device: str) -> None:
    logits = cosines(1, 70, torch.float32, device).repeat(6, 1)
    ((row, col),) = sinkhorn([logits], TEMPERATURE, impl=impl)
    p = probabilities(logits, row, col)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 70), rtol=1e-5, atol=0)


def test_entry_without_rows_stays_finite(impl: str, device: str) -> None:
    logits = cosines(4, 66, torch.float32, device)
    (alone,) = sinkhorn([logits], TEMPERATURE, impl=impl)
    (row, col), (no_row, no_col) = sinkhorn([logits, logits[:0]], TEMPERATURE, impl=impl)
    assert torch.equal(row, alone[0])
    assert torch.equal(col, alone[1])
    assert no_row.shape == (0,)
    assert no_col.isfinite().all()


def test_wrong_arguments_are_refused(impl: str, device: str) -> None:
    logits = cosines(2, 4, torch.float32, device)
    with pytest.raises(ValueError, match="at least one entry and one iteration, got 0 and 3"):
        sinkhorn([], TEMPERATURE, impl=impl)
    with pytest.raises(ValueError, match="at least one entry and one iteration, got 1 and 0"):
        sinkhorn([logits], TEMPERATURE, 0, impl=impl)


@pytest.mark.runs
def test_two_ranks_equal_one_process(impl: str, tmp_path: Path) -> None:
    """Rows divided 5 to 3, 4 to 0 and 0 to 0; one all-reduce per iteration for all of them."""
    if impl == "triton" and not interpreted():
        pytest.skip("the ranks are on the CPU: test_interpreter.py runs this")
    command = [sys.executable, str(RANKS), impl, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(RANKS.parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    entries = [torch.cat(parts) for parts in zip(first["logits"], second["logits"], strict=True)]
    expected = sinkhorn(entries, TEMPERATURE, impl=impl)
    for (row, col), one, other in zip(expected, first["scalings"], second["scalings"], strict=True):
        torch.testing.assert_close(torch.cat([one[0], other[0]]), row, rtol=1e-6, atol=2e-6)
        assert torch.equal(one[1], other[1])
        torch.testing.assert_close(one[1], col, rtol=1e-6, atol=2e-6)
    assert first["all_reduces"] == second["all_reduces"] == 3
