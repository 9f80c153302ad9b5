"""Training without shards and without DALI: random pictures that are on the device already."""

from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.bench.plain import Inputs
from pipeline.config import DataConfig, ExperimentConfig
from pipeline.data.loader import Batch, Loader, Tally
from pipeline.data.reader import Dataset
from pipeline.elastic import Subnet
from pipeline.engine.distributed import Ranks
from pipeline.method.schedules import StepValues
from pipeline.run.step import Trainer

_BATCHES = 2  # by turns: the same one again and again would be learnt by heart
_CELLS = 6  # along a side of a picture
_EPOCH = 1_000_000


class SyntheticLoader(Loader):
    """A few batches by turns, made once: coarse patterns that tell images apart, under noise, in 256 levels.

    Args:
        data: sizes and counts of the crops.
        channels: of an image.
        rank, world_size, start_sample, device: see `Loader`.
    """

    def __init__(
        self,
        data: DataConfig,
        channels: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.samples, self.next_sample, self.skipped = _EPOCH, start_sample, Counter()
        self.tally = Tally()
        random = torch.Generator(device).manual_seed(data.seed + rank)
        self._batches = []
        for _ in range(_BATCHES):
            patterns = torch.rand(data.batch_size, channels, _CELLS, _CELLS, generator=random, device=device)
            kinds = ((2, data.global_crops.size), (data.local_crops.count, data.local_crops.size))
            self._batches.append(Batch(*(_pictures(patterns, *kind, random) for kind in kinds)))

    def __next__(self) -> Batch:
        number = self.next_sample // self._stride
        self.next_sample += self._stride
        return self._batches[number % _BATCHES]

    def close(self) -> None:
        """There is nothing to stop."""


def _pictures(patterns: Tensor, crops: int, side: int, random: torch.Generator) -> Tensor:
    """`[B, C, n, n]` in [0, 1] -> normalised crops `[crops B, C, side, side]`, image-major."""
    pictures = interpolate(patterns.repeat_interleave(crops, 0), size=side, mode="nearest")
    noise = torch.rand(pictures.shape, generator=random, device=pictures.device)
    levels = (255 * (0.7 * pictures + 0.3 * noise)).to(torch.uint8)
    return levels.float().div_(127.5).sub_(1)


class TensorTrainer(Trainer):
    """Trains on synthetic batches in place of those of its shards."""

    def start_data(self, sample: int) -> None:
        self.loader = SyntheticLoader(
            self.config.data,
            self.config.model.in_chans,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_sample=sample,
            device=self.ranks.device,
        )


class BenchTrainer(TensorTrainer):
    """Trains chosen sub-networks, on synthetic batches or on shards.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        synthetic: without shards.

    Attributes:
        chosen: the next elastic student, or None for what the experiment draws.
    """

    def __init__(self, config: ExperimentConfig, ranks: Ranks, synthetic: bool):
        self.synthetic = synthetic
        self.chosen: Subnet | None = None
        super().__init__(config, ranks)

    def open_dataset(self) -> Dataset | None:
        return None if self.synthetic else super().open_dataset()

    def start_data(self, sample: int) -> None:
        if self.synthetic:
            super().start_data(sample)
        else:
            Trainer.start_data(self, sample)

    def draw(self, step: int) -> Subnet | None:
        return None if self.config.sampling.alone else self.chosen or super().draw(step)

    def plain_inputs(self, batch: Batch, step: int, values: StepValues) -> Inputs:
        """A batch with the masks that this trainer would put on it."""
        masks = self._masks(step, values)
        return Inputs.of(batch.global_crops.to(self.dtype), batch.local_crops.to(self.dtype), masks)
