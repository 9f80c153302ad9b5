import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data import loader as loaders
from pipeline.data import repair
from pipeline.data.images import Header
from pipeline.data.intake import Intake
from pipeline.data.loader import Batch, Loader
from pipeline.data.reader import Dataset
from pipeline.data.stream import Skip
from pipeline.errors import UserError
from pipeline.run.directory import RunDirectory

WORKERS = Path(__file__).parents[1] / "workers"


def data_config(shard: Path | list[Path], **keys: Any) -> DataConfig:
    train = [str(path) for path in shard] if isinstance(shard, list) else str(shard)
    small = {"global_crops": {"size": 32}, "local_crops": {"count": 2, "size": 16}, "threads": 1, "batch_size": 4}
    return DataConfig.model_validate({**small, "train": train, "window": 2, **keys})


def take(count: int, data: DataConfig, **options: Any) -> list[Batch]:
    loader = Loader(data, **options)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def equal(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(x, y) for one, other in zip(ones, others, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.fixture
def shards(make_shard: Callable[..., Path], pictures: list[bytes]) -> list[Path]:
    """30 samples in 3 shards; the number of a batch's samples does not divide it."""
    return [
        make_shard({f"k{s}{i}.jpg": pictures[10 * s + i] for i in range(10)}, f"train-{s:06d}.tar") for s in range(3)
    ]


def test_batches_have_the_announced_shapes(shards: list[Path]) -> None:
    batch = take(1, data_config(shards))[0]
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (8, 3, 16, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float32
    assert 0.5 < batch.global_crops.std() < 2


def test_no_local_crops_is_an_empty_batch_of_them(shards: list[Path]) -> None:
    data = data_config(shards, local_crops={"count": 0, "size": 16})
    batch = take(1, data)[0]
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (0, 3, 16, 16)


def test_resuming_anywhere_continues_bit_for_bit_with_other_threads(shards: list[Path]) -> None:
    whole = take(20, data_config(shards))  # 80 samples: more than two epochs
    loader = Loader(data_config(shards))
    for i in (1, 7, 8, 19):
        while loader.next_sample < 4 * i:
            next(loader)
        resumed = take(20 - i, data_config(shards, threads=3), start_sample=loader.next_sample)
        assert equal(resumed, whole[i:])
    loader.close()


def test_two_ranks_see_what_one_rank_sees_with_twice_the_batch(shards: list[Path]) -> None:
    one = take(6, data_config(shards, batch_size=8), start_sample=5)
    ranks = [take(6, data_config(shards), rank=rank, world_size=2, start_sample=5) for rank in range(2)]
    joined = [
        Batch(*(torch.cat(crops) for crops in zip(*batches, strict=True))) for batches in zip(*ranks, strict=True)
    ]
    assert equal(joined, one)


def test_another_world_size_continues_the_stream(shards: list[Path]) -> None:
    loader = Loader(data_config(shards), rank=1, world_size=2)
    next(loader)
    assert loader.next_sample == 8
    resumed = take(1, data_config(shards), start_sample=loader.next_sample)
    assert equal(resumed, take(3, data_config(shards))[2:])
    loader.close()


def test_seed_decides_order_and_augmentation(shards: list[Path]) -> None:
    assert equal(take(2, data_config(shards)), take(2, data_config(shards)))
    assert not equal(take(2, data_config(shards)), take(2, data_config(shards, seed=1)))


def test_batches_stay_valid_while_and_after_the_loader_lives(shards: list[Path]) -> None:
    loader = Loader(data_config(shards))
    held = [next(loader) for _ in range(12)]
    copies = [Batch(*(crops.clone() for crops in batch)) for batch in held]
    for _ in range(12):
        next(loader)
    assert equal(held, copies)
    loader.close()
    del loader
    gc.collect()
    torch.randn(10_000_000).sum()  # reuse of freed memory would show
    assert equal(held, copies)
    assert equal(copies, take(12, data_config(shards)))


def test_awkward_shard_is_delivered_as_it_should_be(odd: Path) -> None:
    """Of the strict cases, what should be skipped is skipped and reported once, and nothing else is."""
    images = {image["key"]: image for image in json.loads((odd / "odd.json").read_text())["images"]}
    skips: list[Skip] = []
    data = data_config(odd / "images-000000.tar", batch_size=8)
    loader = Loader(data, on_skip=skips.append)
    batches = 2 * -(-len(images) // 8)  # two epochs
    for _ in range(batches):
        assert next(loader).global_crops.isfinite().all()
    loader.close()
    skipped = {skip.key for skip in skips}
    assert len(skipped) == len(skips), "one report per key"
    for key, image in images.items():
        if image["strict"]:
            assert (key in skipped) == (image["should"] == "skip"), image["what"]
    assert loader.skipped.total() >= 2 * len(skipped)
    assert {skip.reason for skip in skips} == set(loader.skipped)
    assert all(Path(skip.shard) == odd / "images-000000.tar" and 0 <= skip.position < 8 * batches for skip in skips)


@pytest.fixture
def damaged(make_shard: Callable[..., Path], pictures: list[bytes], spoil: Callable[[bytes], bytes]) -> Path:
    """12 samples of which 3 pass the header check and fail to decode."""
    files = {f"k{i:02d}.jpg": spoil(pictures[i]) if i in (2, 5, 6) else pictures[i] for i in range(12)}
    return make_shard(files)


def test_interior_damage_is_repaired_without_shift(
    damaged: Path, make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    skips: list[Skip] = []
    loader = Loader(data_config(damaged), on_skip=skips.append)
    batches = [next(loader) for _ in range(9)]
    loader.close()
    assert {(skip.key, skip.reason) for skip in skips} == {("k02", "decode"), ("k05", "decode"), ("k06", "decode")}
    sound = make_shard({f"k{i:02d}.jpg": pictures[i] for i in range(12)}, "sound.tar")
    for number, (batch, expected) in enumerate(zip(batches, take(9, data_config(sound)), strict=True)):
        for place in range(4):
            replaced = bool(loader._stream.pick(4 * number + place).rejected)
            for ones, others in zip(batch, expected, strict=True):
                rows = slice(2 * place, 2 * place + 2)
                assert torch.equal(ones[rows], others[rows]) != replaced
    assert loader.skipped["decode"] >= 9


def test_replacement_does_not_depend_on_history(damaged: Path) -> None:
    whole = take(9, data_config(damaged))
    for i in (1, 4, 8):
        assert equal(take(9 - i, data_config(damaged), start_sample=4 * i), whole[i:])
    ranks = [take(9, data_config(damaged, batch_size=2), rank=rank, world_size=2) for rank in range(2)]
    joined = [
        Batch(*(torch.cat(crops) for crops in zip(*batches, strict=True))) for batches in zip(*ranks, strict=True)
    ]
    assert equal(joined, whole)


def test_graph_is_not_built_again_for_damage(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All batches in which something does not decode are made by one other graph, and the first one goes on."""
    built: list[int] = []
    for module in (loaders, repair):
        true = module.make_pipeline
        monkeypatch.setattr(module, "make_pipeline", lambda *a, true=true, **k: built.append(0) or true(*a, **k))
    loader = Loader(data_config(damaged))
    for _ in range(9):
        next(loader)
    loader.close()
    assert len(built) == 2
    assert loader.tally.apart["decode"] >= 1


def test_pipeline_that_does_not_survive_a_failure_is_started_again(damaged: Path) -> None:
    class Mortal:
        def __init__(self, pipeline: Any) -> None:
            self.pipeline, self.dead = pipeline, False

        def run(self) -> Any:
            try:
                if not self.dead:
                    return self.pipeline.run()
            except RuntimeError:
                self.dead = True
                raise
            raise RuntimeError("dead")

    loader = Loader(data_config(damaged))
    loader._pipeline = mortal = Mortal(loader._pipeline)
    batches = [next(loader) for _ in range(9)]
    loader.close()
    assert mortal.dead
    assert equal(batches, take(9, data_config(damaged)))


def test_batch_of_too_many_pixels_is_made_in_parts_and_is_the_same(
    shards: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    loader = Loader(data_config(shards, batch_pixels=1))
    whole = take(5, data_config(shards))
    sizes = [[p.header.rows * p.header.cols for p in loader._reading.pick(range(4 * i, 4 * i + 4))] for i in range(5)]
    loader.close()
    most = sorted(map(sum, sizes))[2]  # two batches have more
    loader = Loader(data_config(shards, batch_pixels=most))
    assert equal([next(loader) for _ in range(5)], whole)
    loader.close()
    assert loader.tally.apart == {"pixels": 2}
    said = [message for message in caplog.messages if "more than data.batch_pixels, is made on the CPU" in message]
    assert len(said) == 1, "named once"
    assert "its largest image is k" in said[0]
    alone = data_config(shards, batch_pixels=1)
    for colours in (None, "eager"):
        assert equal(take(5, alone, colours=colours), take(5, data_config(shards), colours=colours))


def test_parts_have_at_most_so_many_pixels_and_all_images_in_order() -> None:
    headers = [Header("jpeg", rows, 10, 1, complete=True, exif_at=()) for rows in (3, 4, 50, 1, 2, 3)]
    assert list(repair.parts(headers, 70)) == [[0, 1], [2], [3, 4, 5]]
    assert list(repair.parts(headers, 1)) == [[i] for i in range(6)]
    assert list(repair.parts(headers, 630)) == [list(range(6))]


def test_pixels_of_values_count_by_the_memory_that_they_take() -> None:
    data = data_config(Path("any.tar"), batch_pixels=600)
    rgb, values = Intake(), Intake(5, (0, 1), (0.5,) * 5, (0.5,) * 5)
    most = [repair.Repair(data, half=False, coloured=True, intake=intake).most for intake in (rgb, values)]
    assert most == [600, 90]  # 1800 bytes


def test_on_a_gpu_known_damage_is_repaired_as_new_damage_is(damaged: Path) -> None:
    """Or a run that goes on would see other pixels than one that was not stopped."""
    loader = Loader(data_config(damaged))
    assert loader._why_apart([], [(0, 2, "decode")]) is None
    loader.device_id = 0
    assert loader._why_apart([], [(0, 2, "decode")]) == "decode"
    assert loader._why_apart([], [(0, 2, "truncated")]) is None
    loader.device_id = None
    loader.close()


def test_what_one_rank_or_start_found_no_other_has_to_find(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips: list[Skip] = []
    expected = take(9, data_config(damaged), on_skip=skips.append)
    run = RunDirectory(tmp_path)
    run.log_skipped([{"key": "old", "shard": "of a version before", "reason": "decode", "position": 1}])
    run.log_skipped(skip._asdict() for skip in (*skips, skips[0]._replace(reason="huge")))
    known = run.undecodable(0)
    assert known == skips
    assert run.undecodable(since=10**6) == []
    monkeypatch.setattr(loaders, "undecodable", None)
    again: list[Skip] = []
    loader = Loader(data_config(damaged), on_skip=again.append)
    loader.learn([*known, skips[0]._replace(shard="another"), skips[0]._replace(sample=99)])
    assert equal([next(loader) for _ in range(9)], expected)
    loader.close()
    assert (loader.tally.apart, again) == ({}, [])
    assert loader.skipped["decode"] >= 9, "counted at every use"


def test_reading_ahead_and_at_once_changes_nothing(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(5, data_config(shards, batch_size=3))
    assert equal(take(5, data_config(shards, batch_size=3, read_ahead=1)), expected)
    together = threading.Barrier(3)
    true = Dataset.image

    def image(self: Dataset, record: int) -> bytearray:
        together.wait(60)
        return true(self, record)

    monkeypatch.setattr(Dataset, "image", image)
    assert equal(take(5, data_config(shards, batch_size=3, read_ahead=1, reads=3)), expected)


def test_orientation_unknown_to_the_header_check_cannot_slip_in(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that decodes to another size than its header was understood to say counts as damaged."""
    from pipeline.data import intake

    true_inspect = intake.inspect

    def misread(data: bytes, max_pixels: int):
        header = true_inspect(data, max_pixels)
        return header._replace(cols=header.cols - 1) if data[-9] % 4 == 0 else header

    monkeypatch.setattr(intake, "inspect", misread)
    skips: list[Skip] = []
    loader = Loader(data_config(shards, batch_size=10), on_skip=skips.append)
    for _ in range(3):
        next(loader)
    loader.close()
    assert {skip.reason for skip in skips} == {"decode"}


def test_only_bad_images_are_one_clear_error(make_shard: Callable[..., Path], pictures: list[bytes]) -> None:
    loader = Loader(data_config(make_shard({"a.jpg": pictures[0]}), max_pixels=1))
    with pytest.raises(UserError, match="unusable images in a row"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("local", [0, 2])
def test_batches_coloured_by_the_kernels_twin_are_those_of_dali(shards: list[Path], local: int) -> None:
    data = data_config(shards, local_crops={"count": local, "size": 16})
    for ours, dalis in zip(take(3, data, colours="eager", dtype=torch.bfloat16), take(3, data), strict=True):
        for one, other in zip(ours, dalis, strict=True):
            assert one.shape == other.shape
            assert one.dtype == torch.bfloat16
            difference = (one.float() - other).abs()
            others = (difference > 2**-7 * other.abs().clamp(min=1)).sum()
            assert others <= 1e-3 * one.numel()  # by a level, where fp32 decides what a half is rounded to


def test_unknown_type_or_device_is_refused(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*float16"):
        Loader(data_config(shards), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        Loader(data_config(shards), device="meta")


def test_half_precision_is_delivered_on_request(shards: list[Path]) -> None:
    half, single = (take(1, data_config(shards), dtype=dtype)[0] for dtype in (torch.float16, torch.float32))
    assert torch.equal(half.global_crops, single.global_crops.half())


def test_closing_leaves_no_thread_behind(shards: list[Path]) -> None:
    before = set(threading.enumerate())
    take(2, data_config(shards))
    assert set(threading.enumerate()) <= before


def test_signals_reach_the_main_thread_and_disturb_no_batch(launch: Callable, shards: list[Path]) -> None:
    (output,) = launch(WORKERS / "signalled.py", 1, *shards)
    assert output.splitlines()[-1] == "10 40"


@pytest.mark.gpu
def test_gpu_delivers_what_the_cpu_delivers_and_resumes_exactly(shards: list[Path], damaged: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for hue in ("yiq", "hsv"):
        data = data_config([*shards[1:], damaged], hue=hue)  # damaged is in the place of the first
        gpu, cpu = take(12, data, device="cuda:0"), take(12, data)
        for ones, others in zip(gpu, cpu, strict=True):
            for x, y in zip(ones, others, strict=True):
                assert x.is_cuda
                assert (x.cpu() - y).abs().mean() < 0.02  # a level is 0.017
        assert equal(take(5, data, device="cuda:0", start_sample=28), gpu[7:])


def test_lanes_are_the_same_batches_on_any_number_of_ranks(shards: list[Path]) -> None:
    """Every rank takes lanes of the batch; all together see what one rank sees, in the same order."""
    lanes = {"lanes": 4, "seed": 2}
    one = take(6, data_config(shards, batch_size=8, **lanes), start_sample=16)
    ranks = [take(6, data_config(shards, **lanes), rank=rank, world_size=2, start_sample=16) for rank in range(2)]
    joined = [
        Batch(*(torch.cat(crops) for crops in zip(*batches, strict=True))) for batches in zip(*ranks, strict=True)
    ]
    assert equal(joined, one)
    assert not equal(one, take(6, data_config(shards, batch_size=8, seed=2), start_sample=16))
