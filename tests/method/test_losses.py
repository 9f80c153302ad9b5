"""Losses against values computed by hand; the whole objective is held to fp64 in test_three_steps.py."""

import math

import pytest
import torch

from kernels.distillation import Targets
from pipeline.method import losses
from pipeline.method.losses import Centering, Logits, Pairing


def test_pairs_are_image_major():
    pairing = Pairing.of(images=2, local_crops=3, device=torch.device("cpu"))
    assert pairing.local.tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    assert pairing.swapped[:, 0].tolist() == [1, 0, 3, 2]
    assert pairing.global_same[:, 0].tolist() == [0, 1, 2, 3]
    assert pairing.local_same[:, 0].tolist() == list(range(6))


def test_dino_of_uniform_students_is_the_entropy_bound():
    torch.manual_seed(0)
    k, images, local = 8, 3, 2
    student = Logits([torch.zeros(images * local, k)], [torch.zeros(2 * images, k)], [])
    sharp = torch.randn(2 * images, k) * 100
    target = Targets(sharp, -sharp.logsumexp(1), None, 1.0)
    loss = losses.dino(student, [target], Pairing.of(images, local, torch.device("cpu")), 0.1, "eager")
    # 2 cross terms and 2 L local terms, each log K, over 2 L + 2
    assert loss.item() == pytest.approx(math.log(k))


def test_dino_compares_a_global_crop_with_the_other_one_only():
    """One image: crop 1's target is prototype 0, crop 2's is prototype 1, and each student is sure of one."""
    sure = torch.tensor([[10.0, -10.0], [-10.0, 10.0]])
    target = Targets(sure * 10, -(sure * 10).logsumexp(1), None, 1.0)
    pairing = Pairing.of(1, 0, torch.device("cpu"))
    swapped = Logits([torch.zeros(0, 2)], [sure.flip(0)], [])
    same = Logits([torch.zeros(0, 2)], [sure], [])
    assert losses.dino(swapped, [target], pairing, 1.0, "eager").item() == pytest.approx(0.0, abs=1e-6)
    assert losses.dino(same, [target], pairing, 1.0, "eager").item() == pytest.approx(20.0)


def test_ibot_weighs_every_masked_crop_alike():
    student = torch.zeros(3, 4)
    target = Targets(torch.zeros(3, 4), torch.full((3,), -math.log(4)), None, 1.0)
    # crop 0 has two masked patches, crop 1 has one, crops 2 and 3 none: 2 log 4 over 4 crops
    loss = losses.ibot([student], [target], torch.tensor([0.5, 0.5, 1.0]), 4, 0.1, "eager")
    assert loss.item() == pytest.approx(2 * math.log(4) / 4)


def test_koleo_of_four_points_on_a_circle():
    """Two images at a right angle in view 1, opposite in view 2: - log sqrt 2 - log 2."""
    cls = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])
    assert losses.koleo(cls, 2).item() == pytest.approx(-math.log(math.sqrt(2)) - math.log(2), abs=1e-6)


def test_koleo_groups_do_not_see_each_other():
    cls = torch.randn(8, 5)
    apart = (losses.koleo(cls[:4], 2) + losses.koleo(cls[4:], 2)) / 2
    assert torch.allclose(losses.koleo(cls, 2), apart)


def test_centers_move_only_when_the_step_is_committed():
    centering = Centering("softmax", [4], torch.device("cpu"), "eager")
    logits = Logits(
        [torch.zeros(0, 4)], [torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0]])], [torch.zeros(0, 4)]
    )
    before = centering.targets(logits, 0.1).cls[0]
    assert torch.equal(before.col, torch.zeros(4))
    assert torch.equal(centering.center["cls"][0], torch.zeros(4))
    centering.commit(torch.tensor(0.0))
    assert torch.equal(centering.center["cls"][0], torch.zeros(4))
    centering.targets(logits, 0.1)
    centering.commit(torch.tensor(1.0))
    assert torch.allclose(centering.center["cls"][0], 0.1 * torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert torch.equal(centering.center["patch"][0], torch.zeros(4))  # no masked patch: nothing learnt, no NaN


@pytest.mark.parametrize("method", ["sinkhorn", "softmax", "none"])
def test_targets_are_distributions(method):
    torch.manual_seed(0)
    logits = Logits([], [torch.randn(6, 5)], [torch.randn(3, 5)])
    targets = Centering(method, [5], torch.device("cpu"), "eager").targets(logits, 0.5)
    for target in (*targets.cls, *targets.patch):
        col = torch.zeros(5) if target.col is None else target.col
        p = torch.exp(target.logits / target.temperature + target.row[:, None] + col)
        assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)


def test_features_have_turned_by_one_minus_their_cosine_with_what_they_are_held_to():
    features = torch.tensor([[2.0, 0], [0, 3], [1, 1], [5, 5]])
    held = torch.tensor([[1.0, 0], [1, 0], [1, 0], [-1, -1]])
    rows = torch.tensor([True, True, True, False])
    assert losses.turned(features, held, rows).item() == pytest.approx((0 + 1 + 1 - 0.5**0.5) / 3)
    assert losses.turned(features, held, ~rows).item() == pytest.approx(2)
    assert losses.turned(features, held, torch.zeros(4, dtype=torch.bool)).item() == 0
