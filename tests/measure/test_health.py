"""Signs of collapse against hand-computed values."""

import math

import pytest
import torch

from kernels.distillation import Targets
from kernels.sinkhorn import sinkhorn
from pipeline.measure.health import Probe, deviation, effective_rank, largest_entropy

K = (8, 32)


def softmax_targets(logits, temperature=1.0):
    return [Targets(x, -torch.logsumexp(x / temperature, 1), None, temperature) for x in logits]


def look(targets, cls):
    probe = Probe(K, 0, 0.1, torch.device("cpu"), "eager")
    probe.teacher(targets, cls)
    return probe.reduce().read()["teacher"]


def test_effective_rank_is_one_for_equal_rows_and_counts_orthogonal_ones():
    assert effective_rank(torch.ones(16, 5)) == pytest.approx(1.0)
    assert effective_rank(torch.eye(6, 20)) == pytest.approx(6.0)
    assert effective_rank(torch.eye(20, 6)) == pytest.approx(6.0)
    weights = torch.tensor([3.0, 1.0]) / 4
    expected = math.exp(-(weights * weights.log()).sum())
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_effective_rank_equals_that_of_the_singular_values_of_any_matrix():
    x = torch.randn(40, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-9)


def test_features_that_are_not_finite_have_no_rank():
    x = torch.ones(4, 4)
    x[1, 2] = float("nan")
    assert effective_rank(x).isnan()


def test_deviation_runs_from_collapsed_to_spread_out():
    assert deviation(3 * torch.ones(7, 4)) == pytest.approx(0.0, abs=1e-7)
    assert deviation(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])) == pytest.approx(1.0)
    assert deviation(torch.eye(2)) == pytest.approx(math.sqrt(0.5))


def test_uniform_targets_have_full_entropy_and_no_divergence():
    health = look(softmax_targets([torch.zeros(6, k) for k in K]), torch.eye(6))
    assert health.entropy == pytest.approx(largest_entropy(K))
    assert health.uniform_kl == pytest.approx(0.0, abs=1e-6)
    assert health.used == 1.0


def test_targets_that_agree_on_one_prototype_have_no_entropy():
    logits = [torch.full((6, k), -1000.0) for k in K]
    for x in logits:
        x[:, 3] = 1000.0
    health = look(softmax_targets(logits), torch.eye(6))
    assert health.entropy == pytest.approx(0.0, abs=1e-6)
    assert health.uniform_kl == pytest.approx(largest_entropy(K))
    assert health.used == pytest.approx((1 / 8 + 1 / 32) / 2)


def test_sharp_targets_that_differ_keep_the_mean_spread_out():
    logits = [1000.0 * torch.eye(8, k) for k in K]
    health = look(softmax_targets(logits), torch.eye(8))
    assert health.entropy == pytest.approx(math.log(8))
    assert health.used == pytest.approx((8 / 8 + 8 / 32) / 2)


def test_sinkhorn_targets_are_read_with_their_column_bias():
    logits = [torch.randn(24, k, generator=torch.Generator().manual_seed(k)) for k in K]
    scalings = sinkhorn(logits, 0.3, iterations=20, impl="eager")
    targets = [Targets(x, row, col, 0.3) for x, (row, col) in zip(logits, scalings, strict=True)]
    assert look(targets, torch.eye(24)).entropy == pytest.approx(largest_entropy(K), abs=1e-4)


def test_students_are_seen_apart_by_branch_and_band():
    probe = Probe(K, 2, 0.5, torch.device("cpu"), "eager")
    logits = [torch.randn(10, k, generator=torch.Generator().manual_seed(k)) for k in K]
    probe.student("intact", [torch.zeros(10, k) for k in K], torch.eye(10))
    probe.student("elastic", logits, torch.ones(10, 4))
    health = probe.reduce().read()
    assert set(health) == {"intact", "q3", "elastic"}
    assert health["elastic"] == health["q3"]
    assert health["elastic"].effective_rank == pytest.approx(1.0)
    p = [(x / 0.5).softmax(1) for x in logits]
    entropy = sum(-(m := q.mean(0)).mul(m.log()).sum() for q in p) / len(p)
    kl = sum((q * (q * q.shape[1]).log()).sum(1).mean() for q in p) / len(p)
    assert health["q3"].entropy == pytest.approx(float(entropy), rel=1e-5)
    assert health["q3"].uniform_kl == pytest.approx(float(kl), rel=1e-5)
    assert health["intact"].effective_rank == pytest.approx(10.0)
