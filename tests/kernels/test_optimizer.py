"""AdamW, the moving average and both copies in one pass, against torch's AdamW in fp64."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.optimizer import AdamWEma, Segment, Shard, Update

# ends within a block, a single element, whole blocks, a gap (padding) and a last one of several blocks
SEGMENTS = [
    Segment(0, 700, 0, 1.0, True),
    Segment(700, 1, 0, 0.5, False),
    Segment(701, 3000, 1, 0.25, True),
    Segment(3701, 395, 2, 1.0, True),
    Segment(4096, 4096, 1, 1.0, False),
]
SIZE = 8200
FACTORS = (0.5, 1.0, 0.25)


def made(device: str, copies: torch.dtype | None, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    master, ema = (torch.randn(SIZE, generator=generator).to(device) for _ in range(2))
    student, teacher = (None if copies is None else torch.zeros(SIZE, dtype=copies, device=device) for _ in range(2))
    return Shard.of(master, ema, student, teacher)


def gradient_of(step: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(10 + step)).to(device, dtype)


def flag(good: bool, device: str) -> Tensor:
    return torch.tensor(float(good), device=device)


class Oracle:
    """The same in fp64, by torch's AdamW with a group per segment."""

    def __init__(self, shard: Shard):
        self.weights = [shard.master[s.start : s.stop].double() for s in SEGMENTS]
        self.average = [shard.ema[s.start : s.stop].double() for s in SEGMENTS]
        self.optimizer = torch.optim.AdamW([{"params": [w]} for w in self.weights])

    def step(self, gradient: Tensor, update: Update) -> None:
        for weights, segment, group in zip(self.weights, SEGMENTS, self.optimizer.param_groups, strict=True):
            weights.grad = gradient[segment.start : segment.stop].double() * FACTORS[segment.part]
            still = segment.part in update.frozen
            group["eps"] = update.eps
            group["lr"] = 0.0 if still else update.lr * segment.lr_scale
            group["weight_decay"] = update.weight_decay if segment.decayed and not still else 0.0
        self.optimizer.step()
        for average, weights in zip(self.average, self.weights, strict=True):
            average.lerp_(weights, 1 - update.momentum)


UPDATES = [Update(0.1, 0.1, 0.9, frozen={2}), Update(0.2, 0.2, 0.95, eps=1e-4), Update(0.0, 0.0, 0.99)]


@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float32, None], ids=str)
@pytest.mark.parametrize("reduced", [torch.float32, torch.bfloat16], ids=str)
def test_three_steps_match_fp64_segment_by_segment(
    copies: torch.dtype | None, reduced: torch.dtype, impl: str, device: str
) -> None:
    shard = made(device, copies)
    padding = shard.master[8192:].clone()
    oracle, one_pass = Oracle(shard), AdamWEma(shard, SEGMENTS, impl=impl)
    for step, update in enumerate(UPDATES):
        gradient = gradient_of(step, device, reduced)
        oracle.step(gradient, update)
        one_pass([gradient], torch.tensor(FACTORS, device=device), flag(True, device), update)
    assert shard.steps == 3
    assert torch.equal(shard.master[8192:], padding)
    states = [oracle.optimizer.state[w] for w in oracle.weights]
    # torch's CUDA kernel takes 1 - 0.999^n in fp32: of a first step of 0.1 that is 6e-7
    by_torch = 1e-6 if impl == "eager" and device == "cuda" else 0.0
    for vector, exact in (
        (shard.master, oracle.weights),
        (shard.ema, oracle.average),
        (shard.first, [s["exp_avg"] for s in states]),
        (shard.second, [s["exp_avg_sq"] for s in states]),
    ):
        for segment, expected in zip(SEGMENTS, exact, strict=True):
            found = vector[segment.start : segment.stop].double()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-7 + by_torch)
    for copy, vector in ((shard.student, shard.master), (shard.teacher, shard.ema)):
        if copy is not None:  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(copy[:8192].float(), vector[:8192], rtol=torch.finfo(copy.dtype).eps, atol=0)


def test_a_flag_that_is_down_leaves_everything_to_the_bit(impl: str, device: str) -> None:
    shard = made(device, torch.bfloat16)
    shard.ema[5], shard.master[5] = -0.0, 0.0  # an average moved by no share at all would turn it positive
    one_pass = AdamWEma(shard, SEGMENTS, impl=impl)
    factors = torch.tensor(FACTORS, device=device)
    one_pass([gradient_of(0, device)], factors, flag(True, device), UPDATES[0])
    shard.ema[5], shard.master[5] = -0.0, 0.0
    assert shard.student is not None and shard.teacher is not None  # noqa: PT018
    shard.student.copy_(shard.master)
    shard.teacher.copy_(shard.ema)
    before = [vector.clone() for vector in shard.vectors]
    for poison in (torch.nan, torch.inf):
        bad = gradient_of(1, device)
        bad[123] = poison
        one_pass([bad], factors * poison, flag(False, device), UPDATES[1])
    assert shard.steps == 1
    for vector, old in zip(shard.vectors, before, strict=True):
        bits = torch.int16 if vector.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(vector.view(bits), old.view(bits))


def test_a_first_step_that_is_bad_leaves_the_next_one_the_first(impl: str, device: str) -> None:
    shards = [made(device, None) for _ in range(2)]
    for shard, flags in zip(shards, ([False, True], [True]), strict=True):
        one_pass = AdamWEma(shard, SEGMENTS, impl=impl)
        for good in flags:
            one_pass([gradient_of(0, device)], torch.tensor(FACTORS, device=device), flag(good, device), UPDATES[0])
    assert all(map(torch.equal, shards[0].vectors, shards[1].vectors))


def test_a_gradient_in_pieces_is_that_gradient(impl: str, device: str) -> None:
    shards = [made(device, torch.bfloat16) for _ in range(2)]
    gradient = gradient_of(0, device)
    pieces = [piece.clone().view(shape) for piece, shape in zip(
        gradient[:8192].split([350, 351, 1000, 6491]), [(35, 10), (351,), (10, 100), (6491,)], strict=True
    )]  # fmt: skip
    for shard, parts in zip(shards, ([gradient], [p.reshape(-1) for p in pieces]), strict=True):
        AdamWEma(shard, SEGMENTS, impl=impl)(
            parts, torch.tensor(FACTORS, device=device), flag(True, device), UPDATES[0]
        )
    assert all(map(torch.equal, shards[0].vectors, shards[1].vectors))


def test_a_gradient_may_be_one_number_for_many_weights_and_is_then_only_read(impl: str, device: str) -> None:
    """What a parameter has that no sub-network of the step used: one zero, which others have too."""
    shards = [made(device, None) for _ in range(2)]
    one = torch.full((1,), 0.5, device=device)
    for shard, gradient in zip(shards, (one.expand(SIZE), torch.full((SIZE,), 0.5, device=device)), strict=True):
        AdamWEma(shard, SEGMENTS, impl=impl)(
            [gradient], torch.tensor(FACTORS, device=device), flag(True, device), UPDATES[0]
        )
    assert one == 0.5
    assert all(map(torch.equal, shards[0].vectors, shards[1].vectors))


def test_momentum_near_one_still_moves_the_average(impl: str, device: str) -> None:
    """Where an average kept in bf16 would stall."""
    shard = Shard.of(torch.full((100,), 2.0, device=device), torch.ones(100, device=device))
    one_pass = AdamWEma(shard, [Segment(0, 100, 0, 1.0, False)], impl=impl)
    gradient, factors = torch.zeros(100, device=device), torch.ones(1, device=device)
    for _ in range(100):
        one_pass([gradient], factors, flag(True, device), Update(0.1, 0.1, 0.9999))
    torch.testing.assert_close(shard.ema, torch.full((100,), 2 - 0.9999**100, device=device), rtol=1e-5, atol=0)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_the_layers(triton: str, device: str) -> None:
    from kernels.fused.optimizer import update_

    counts = []
    for layers in (1, 40):
        segments = [Segment(205 * i, 205, i % 3, 0.9**i, bool(i % 2)) for i in range(layers)]
        one_pass = AdamWEma(made(device, torch.bfloat16), segments, impl=triton)
        factors, good, gradient = torch.tensor(FACTORS, device=device), flag(True, device), gradient_of(0, device)
        one_pass([gradient], factors, good, UPDATES[0])
        with Operations() as operations, mock.patch("kernels.fused.optimizer.update_", wraps=update_) as launch:
            one_pass([gradient], factors, good, UPDATES[1])
        counts.append(operations.count)
        assert launch.call_count == 1
    assert counts[0] == counts[1]


def test_an_empty_shard_is_no_mistake(impl: str, device: str) -> None:
    empty = torch.zeros(0, device=device)
    one_pass = AdamWEma(Shard.of(empty, empty.clone()), [Segment(0, 0, 0, 1.0, True)], impl=impl)
    one_pass([], torch.ones(1, device=device), flag(True, device), UPDATES[0])


def test_wrong_vectors_and_segments_are_refused(impl: str, device: str) -> None:
    def zeros(n: int) -> Tensor:
        return torch.zeros(n, device=device)

    with pytest.raises(ValueError, match=r"shard: expected contiguous vectors of 4, got \[5\]"):
        AdamWEma(Shard.of(zeros(4), zeros(5)), [], impl=impl)
    with pytest.raises(ValueError, match="segments: expected rising ones within 4 elements"):
        AdamWEma(Shard.of(zeros(4), zeros(4)), [Segment(2, 3, 0, 1.0, True)], impl=impl)
    one_pass = AdamWEma(Shard.of(zeros(4), zeros(4)), [Segment(1, 3, 0, 1.0, True)], impl=impl)
    with pytest.raises(ValueError, match="gradients: expected at least 4 elements, got 3"):
        one_pass([zeros(3)], zeros(1), flag(True, device), UPDATES[0])
