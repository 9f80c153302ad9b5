"""Gradients of two passes on their way to a shard, on one rank, or one that takes itself for the first of two.

Real ones are in test_three_steps and test_counts.
"""

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.engine import gradients
from pipeline.engine.flight import Flight
from pipeline.engine.gradients import Reduction
from pipeline.engine.groups import Buckets
from pipeline.engine.sizes import gradient_bytes

SMALL = 2.0**-9  # below what bf16 tells from 1 beside it


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def after_two_passes(precision: torch.dtype, reduced: torch.dtype, every_pass: bool = False) -> list[torch.Tensor]:
    """Of parameters of 2, 3 (never used) and 1 elements; the first pass gives 1 everywhere, the second `SMALL`."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=precision)) for shape in ((1, 2), (3,), (1,))]
    reduction = Reduction(parameters, Buckets((0, 8)), reduced, every_pass)
    for last, slope in ((False, 1.0), (True, SMALL)):
        loss = (parameters[0].sum() + parameters[2].sum()) * slope
        reduction.before_pass(loss, last)
        loss.backward()
        reduction.after_pass()
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


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """Where the buckets begin that a rank has sent, as if there were a second rank without gradients."""
    places = []
    all_reduce = dist.all_reduce

    def noted(vector: Tensor, **kwargs) -> dist.Work | None:
        places.append(vector.storage_offset())
        return all_reduce(vector, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", noted)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return places


def three_layers() -> tuple[list[nn.Parameter], Reduction]:
    """Of 3, 4 and 2 elements, in buckets of 1, 4 and 4: each but the last reaches into the next bucket."""
    layers = [nn.Parameter(torch.ones(size)) for size in (3, 4, 2)]
    return layers, Reduction(layers, Buckets.of(9, 4), torch.float32, every_pass=False)


@pytest.mark.parametrize("used", [(0, 1, 2), (2, 1, 0), (0, 2), (1,), ()])
def test_buckets_are_sent_once_from_the_last_to_the_first_whatever_a_pass_uses_and_in_which_order(used, sent):
    layers, reduction = three_layers()
    first = torch.stack([layer.sum() for layer in layers]).sum() * 2
    reduction.before_pass(first, last=False)
    first.backward()
    reduction.after_pass()
    assert not sent
    second = sum((layers[n].square().sum() for n in used), start=torch.zeros((), requires_grad=True).clone())
    reduction.before_pass(second, last=True)
    assert sent == ([] if used else [5, 1, 0])  # what gets no gradient any more need not wait
    second.backward()
    assert sent == [5, 1, 0]  # by then, before anybody asks
    reduction.after_pass()
    reduction.finish()
    (own,) = reduction.gradients()
    gradients = [torch.full_like(layer, 4.0 if n in used else 2.0) for n, layer in enumerate(layers)]
    assert torch.equal(own, torch.cat(gradients) / 2)
    assert all(layer.grad is None for layer in layers)


def test_a_gradient_that_comes_after_its_bucket_is_an_error_and_not_lost(sent):
    layers, reduction = three_layers()
    loss, within = layers[0].sum(), layers[2].sum()
    loss.register_hook(lambda _: within.backward())  # as reentrant checkpointing does it
    reduction.before_pass(loss, last=True)
    with pytest.raises(RuntimeError, match="after its bucket"):
        loss.backward()


@pytest.fixture
def scattered(monkeypatch) -> None:
    """A second rank without gradients, and collectives that hold nothing but what they are given."""

    def scatter(own: Tensor, whole: Tensor, **_) -> dist.Work:
        return dist.all_reduce(own.copy_(whole[: len(own)]), async_op=True)

    monkeypatch.setattr(gradients, "_reduce_scatter", scatter)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


def most_at_once(run) -> int:
    """Bytes that torch held more than before, at the most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("passes", [2, 1])
@pytest.mark.parametrize(
    ("stage", "buckets", "precision", "reduced"),
    [
        *((0, 5, 4, reduced) for reduced in (4, 2)),
        *((stage, 5, *bytes_) for stage in (1, 2) for bytes_ in ((4, 4), (2, 4), (2, 2), (4, 2))),
        *((2, few, 2, 4) for few in (2, 1)),
    ],
)
def test_gradients_take_what_the_plan_says(scattered, stage, buckets, precision, reduced, passes):
    many, size, dtypes = 200, 5000, {4: torch.float32, 2: torch.bfloat16}
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtypes[precision])) for _ in range(many)]
    length = many * size // buckets
    cut = Buckets.of(many * size, length, 2 if stage else 1)
    reduction = Reduction(parameters, cut, dtypes[reduced], every_pass=stage == 2)

    def step() -> None:
        for number in range(passes):
            loss = torch.stack([parameter.sum() for parameter in parameters]).sum()
            reduction.before_pass(loss, last=number == passes - 1)
            loss.backward()
            reduction.after_pass()
        reduction.finish()

    planned = gradient_bytes(many * size, 2, stage, precision, reduced, passes, length)
    assert most_at_once(step) == pytest.approx(planned, rel=0.02)


def test_a_collective_that_fails_says_so_where_it_is_waited_for():
    class Failed:
        def wait(self) -> None:
            raise RuntimeError("connection closed by peer")

    flight = Flight()
    flight.add(dist.all_reduce(torch.ones(1), async_op=True), torch.ones(1))
    flight.add(Failed(), torch.ones(1))
    flight.land(leaving=1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        flight.land()
