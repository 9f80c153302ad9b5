"""Images of shards as a model wants them in evaluation: timm's own transform, samples by record number."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.images import BadImage, decode, inspect
from pipeline.data.labels import Numbering
from pipeline.data.patterns import Shards
from pipeline.data.reader import Dataset

MAX_PIXELS = DataConfig().max_pixels  # where no run's config says otherwise


class EvalImages:
    """The samples of some shards, resized and cropped but not yet normalised, so that they are small to keep.

    Args:
        shards: pattern or patterns.
        preprocessing: what `timm.data.resolve_data_config` says of a model.
        max_pixels: larger images count as bad.
        numbering: of the classes, where other shards have another.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(
        self,
        shards: Shards,
        preprocessing: Mapping[str, Any],
        max_pixels: int = MAX_PIXELS,
        numbering: Numbering | None = None,
    ):
        from timm.data import create_transform

        self.dataset = Dataset(shards)
        self.max_pixels, self.numbering = max_pixels, numbering or Numbering({})
        self.transform = create_transform(**preprocessing, is_training=False, normalize=False)
        self._mean = torch.tensor(preprocessing["mean"]).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing["std"]).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, record: int) -> Tensor:
        """The image as uint8 `[3, H, W]`.

        Raises:
            BadImage: it cannot be used, for the reason given.
        """
        data = self.dataset.image(record)
        inspect(data, self.max_pixels)
        return self.transform(decode(data))

    def sample(self, record: int) -> tuple[int, Tensor]:
        """Label and image of a record; raises as `label` and `load` do."""
        return self.label(record), self.load(record)

    def label(self, record: int) -> int:
        """The class index.

        Raises:
            BadImage: reason `unlabelled` or `label` (its file holds no class index, or one without a class name).
        """
        try:
            label = self.dataset.label(record)
            if label is not None:
                return self.numbering.of(self.dataset.shard(record), label)
        except ValueError as error:
            raise BadImage("label") from error
        raise BadImage("unlabelled")

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` -> fp32 of mean 0 and deviation 1, on the same device."""
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        return images.float().div(255).sub(mean).div(std)
