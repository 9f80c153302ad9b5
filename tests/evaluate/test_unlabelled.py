"""Scores without labels: exact at the ends of their range, the same on many ranks."""

import pytest
import torch

from pipeline.evaluate.unlabelled import NEIGHBOURS, nearest, share_in_common, unlabelled_scores
from pipeline.models.loading import RunModels, open_heads
from pipeline.models.proof import load_proof_images


@pytest.fixture(scope="module")
def scores(trained_run):
    models = RunModels.open(trained_run)
    images = load_proof_images(models.config, models.config.data.val, 40).images
    subnets = [models.grid.smallest, models.grid.largest]
    return models, images, unlabelled_scores(models, open_heads(trained_run), subnets, images)


def test_nearest_others_by_hand():
    angles = torch.tensor([0.0, 1.0, 3.0, 7.0]).deg2rad()
    features = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    assert nearest(features, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert nearest(features).shape == (4, 3)


def test_share_of_common_neighbours_by_hand():
    a, b = torch.tensor([[1, 2], [0, 3]]), torch.tensor([[2, 1], [2, 3]])
    assert share_in_common(a, b) == 0.75
    assert share_in_common(a, a) == 1.0


def test_the_largest_network_agrees_with_itself_and_its_loss_is_an_entropy(scores, trained_run):
    models, images, found = scores
    largest = found[models.grid.largest.name]
    assert largest.agreement == 1.0
    heads = open_heads(trained_run)
    with torch.inference_mode():
        features = models.backbone(images).cls
        entropies = []
        for logits in heads([features])[0]:
            log_p = (logits.double() / models.config.loss.student_temp).log_softmax(1)
            entropies.append(-(log_p.exp() * log_p).sum(1).mean())
    assert largest.loss == pytest.approx(torch.stack(entropies).mean().item(), abs=1e-4)


def test_a_smaller_network_agrees_less_and_loses_more(scores):
    models, images, found = scores
    small, large = found[models.grid.smallest.name], found[models.grid.largest.name]
    assert NEIGHBOURS / (len(images) - 1) * 0.5 < small.agreement < 1
    assert small.loss > large.loss
    assert 1 <= small.rank <= models.grid.smallest.width


def test_heads_are_those_of_the_branch(trained_run):
    teacher, student = open_heads(trained_run), open_heads(trained_run, "student")
    assert teacher.state_dict().keys() == student.state_dict().keys()
    assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
