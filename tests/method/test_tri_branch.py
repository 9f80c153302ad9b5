"""The weights of what the elastic student learns from."""

import copy
import math

import numpy as np
import pytest
import torch

from pipeline.config import ExperimentConfig
from pipeline.elastic import Subnet
from pipeline.method.losses import Centering
from pipeline.method.schedules import Schedules
from pipeline.method.tri_branch import Crops, StochasticDepth, TriBranch
from pipeline.run.step import build_student

KOLEO, DINO, IBOT = "koleo", "dino", "ibot"
FROM_INTACT = {"distill_global", "distill_local"}


@pytest.fixture
def elastic(experiment):
    """The gradient of the elastic student's loss as one vector, and the names of its terms, by weights."""

    def of(**weights):
        config = ExperimentConfig.model_validate(experiment(loss={"ibot_start_epoch": 0, **weights}))
        student, size, images = build_student(config), config.model.image_size, 4
        patches = math.prod(student.backbone.patch_grid(size))
        masks = np.random.default_rng(0).random((2 * images, patches)) < 0.3
        crops = Crops.of(*(torch.randn(2 * images, 3, s, s) for s in (size, size // 2)), masks)
        centering = Centering("sinkhorn", config.heads.prototypes, torch.device("cpu"), "eager")
        branch = TriBranch(config.loss, student.backbone.grid.largest, StochasticDepth(0, 0.0, 0), centering)
        values = Schedules(config.optim, config.loss, images).at(5)
        targets = branch.teacher_targets(copy.deepcopy(student), crops, values)
        gradients = []

        def backward(loss):
            student.zero_grad()
            loss.backward()
            gradients.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                        for p in student.parameters()
                    ]
                )
            )

        losses = branch.run(student, backward, crops, targets, Subnet(32, (2,)), 5, 0)
        return gradients[1], {term for term, student in losses.terms if student == "elastic"}

    return of


def test_what_the_elastic_student_learns_from_teacher_and_intact_is_weighed_apart(elastic):
    paper, terms = elastic()
    assert terms == {KOLEO, DINO, IBOT, *FROM_INTACT}
    from_teacher, terms = elastic(same_view_weight=0)
    assert terms == {KOLEO, DINO, IBOT}
    from_intact, terms = elastic(cross_view_weight=0)
    assert terms == {KOLEO, *FROM_INTACT}
    spread = from_teacher + from_intact - paper  # KoLeo stands in both
    mixed, _ = elastic(cross_view_weight=0.5, same_view_weight=3)
    torch.testing.assert_close(
        mixed, 0.5 * (from_teacher - spread) + 3 * (from_intact - spread) + spread, rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(mixed, paper, rtol=0.1)


def test_an_elastic_student_that_learns_from_nobody_is_refused(experiment):
    tree = experiment(loss={"cross_view_weight": 0, "same_view_weight": 0})
    with pytest.raises(ValueError, match=r"learns from nobody.*sampling.assignment=none"):
        ExperimentConfig.model_validate(tree)
