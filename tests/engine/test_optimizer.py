"""The pass over a shard as torch's optimizer, and what comes before it."""

import pytest
import torch

from kernels.optimizer import AdamWEma, Shard, Update
from pipeline.config import OptimConfig
from pipeline.engine.groups import Buckets, GroupSpec, in_buckets
from pipeline.engine.optimizer import Decision, FlatAdamW, clip_factors, module_squares, update_of
from pipeline.method.schedules import StepValues


def spec(module: str, size: int, lr_scale: float = 1.0, decayed: bool = True, prototypes: bool = False) -> GroupSpec:
    return GroupSpec(module, lr_scale, decayed, prototypes, (f"{module}.{size}",), ((size,),))


SPECS = [
    spec("backbone", 5, 0.5),
    spec("backbone", 3, decayed=False),
    spec("heads", 4),
    spec("heads", 6, prototypes=True),
]
ALONE = Buckets((0, 18))


def test_three_ranks_hold_each_element_once():
    """18 elements and 3 of padding, 7 a rank: the second begins within the second group, the third in the last one."""
    shards = [Shard.of(torch.zeros(7), torch.zeros(7)) for _ in range(3)]
    groups = [in_buckets(SPECS, shard, Buckets((0, 21), 3, rank)) for rank, shard in enumerate(shards)]
    pieces = [[tuple(p) for rank in groups for p in rank[i].pieces] for i in range(len(SPECS))]
    assert pieces == [[(0, 0, 5)], [(0, 0, 2), (0, 2, 1)], [(0, 0, 4)], [(0, 0, 2), (0, 2, 4)]]
    places = [[(g.place.start, g.place.stop) for g in rank] for rank in groups]
    assert places == [
        [(0, 5), (5, 7), (7, 7), (7, 7)],
        [(0, 0), (0, 1), (1, 5), (5, 7)],
        [(0, 0), (0, 0), (0, 0), (0, 4)],
    ]


def test_three_ranks_hold_a_part_of_each_bucket():
    """21 elements again, in buckets of 3, 9 and 9, of which a rank has 1, 3 and 3."""
    every = [Buckets.of(21, 11, 3, rank) for rank in range(3)]
    assert every[0].bounds == (0, 3, 12, 21)
    shards = [Shard.of(torch.zeros(7), torch.zeros(7)) for _ in every]
    groups = [in_buckets(SPECS, shard, buckets) for shard, buckets in zip(shards, every, strict=True)]
    pieces = [[[tuple(p) for p in rank[i].pieces] for rank in groups] for i in range(len(SPECS))]
    assert pieces == [  # group by group and rank by rank
        [[(0, 0, 1), (1, 3, 2)], [(0, 1, 1)], [(0, 2, 1)]],
        [[(0, 0, 1)], [(0, 1, 2)], []],
        [[], [(0, 0, 1)], [(0, 1, 3)]],
        [[(0, 0, 3)], [(0, 3, 3)], []],
    ]
    assert [[(g.place.start, g.place.stop) for g in rank] for rank in groups] == [
        [(0, 3), (3, 4), (4, 4), (4, 7)],
        [(0, 1), (1, 3), (3, 4), (4, 7)],
        [(0, 1), (1, 1), (1, 4), (4, 4)],
    ]
    assert [[every[1].own(i), every[1].local(i)] for i in (0, 2)] == [
        [slice(1, 2), slice(0, 1)],
        [slice(15, 18), slice(4, 7)],
    ]


def test_a_step_is_torchs_adamw_with_a_group_per_multiplier():
    shard = Shard.of(torch.randn(18, generator=torch.Generator().manual_seed(3)), torch.zeros(18))
    groups = in_buckets(SPECS, shard, ALONE)
    plain = [group.master.double() for group in groups]
    ours = FlatAdamW([torch.zeros(1)])
    ours.attach(AdamWEma(shard, [group.segment for group in groups], impl="eager"))
    ours.param_groups[0]["eps"] = 1e-4
    ours.step()  # of nothing that was decided
    theirs = torch.optim.AdamW([{"params": [w]} for w in plain], eps=1e-4)
    values = StepValues(0.0, 0.1, 0.2, 0.9, 0.04, True, prototypes_frozen=True, backbone_frozen=False)
    ours.param_groups[0]["params"] = [torch.zeros(18)]
    for step in range(3):
        gradient = torch.randn(18, generator=torch.Generator().manual_seed(step))
        for w, group, settings in zip(plain, groups, theirs.param_groups, strict=True):
            frozen = group.spec.prototypes
            settings["lr"] = 0.0 if frozen else 0.1 * group.spec.lr_scale
            settings["weight_decay"] = 0.2 if group.spec.decayed and not frozen else 0.0
            w.grad = 0.5 * gradient[group.place].double()
        ours.param_groups[0]["params"][0].grad = gradient
        ours.decide(Decision(torch.full((3,), 0.5), torch.ones(()), update_of(values)))
        ours.step()
        theirs.step()
    for w, group in zip(plain, groups, strict=True):
        torch.testing.assert_close(group.master.double(), w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            group.moments["exp_avg_sq"].double(), theirs.state[w]["exp_avg_sq"], rtol=1e-6, atol=0
        )
    assert shard.steps == 3


def test_parts_freeze_each_by_itself():
    values = StepValues(0.0, 0.1, 0.2, 0.9, 0.04, True, prototypes_frozen=False, backbone_frozen=True)
    update = update_of(values)
    assert update == Update(0.1, 0.2, 0.9, frozen=frozenset({0}))
    lr_and_decay = [update.of(group.segment) for group in in_buckets(SPECS, Shard.of(*torch.zeros(2, 18)), ALONE)]
    assert lr_and_decay == [(0.0, 0.0), (0.0, 0.0), (0.1, 0.2), (0.1, 0.2)]


def test_prototypes_are_clipped_with_the_heads():
    optim = OptimConfig(clip_grad=3.0)
    assert clip_factors(torch.tensor([6.0, 1.0]), optim).tolist() == pytest.approx([0.5, 1.0, 1.0])
    assert clip_factors(torch.tensor([1.0, 12.0]), optim).tolist() == pytest.approx([1.0, 0.25, 0.25])


@pytest.mark.parametrize("cuts", [(18,), (5, 3, 4, 6), (1, 9, 8)])
def test_norms_are_per_module_however_the_gradient_is_cut(cuts):
    gradients = torch.arange(18.0).split(cuts)
    groups = in_buckets(SPECS, Shard.of(*torch.zeros(2, 18)), ALONE)
    assert module_squares(groups, gradients).tolist() == pytest.approx(
        [sum(i * i for i in range(8)), sum(i * i for i in range(8, 18))]
    )


def test_a_rank_without_a_module_has_nothing_of_its_norm():
    groups = in_buckets(SPECS, Shard.of(*torch.zeros(2, 7)), Buckets((0, 21), 3, 2))
    assert module_squares(groups, [torch.ones(7)]).tolist() == [0.0, 4.0]  # padding counts for nothing
