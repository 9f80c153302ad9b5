"""Images of shards as a model wants them in evaluation: timm's own transform, samples by record number."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.data.images import BadImage, decode, inspect
from pipeline.data.intake import Intake, upright
from pipeline.data.labels import Numbering
from pipeline.data.patterns import Shards
from pipeline.data.reader import Dataset


class EvalImages:
    """The samples of some shards, resized and cropped but not yet normalised, so that they are small to keep.

    Args:
        shards: pattern or patterns.
        preprocessing: what `timm.data.resolve_data_config` says of a model.
        intake: how bytes become values; mean and deviation are those of `preprocessing`.
        numbering: of the classes, where other shards have another.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(
        self,
        shards: Shards,
        preprocessing: Mapping[str, Any],
        intake: Intake | None = None,
        numbering: Numbering | None = None,
    ):
        from timm.data import create_transform

        self.intake, self.numbering = intake or Intake(), numbering or Numbering({})
        self.dataset = Dataset(shards, image=self.intake.image)
        self.transform = create_transform(**preprocessing, is_training=False, normalize=False)
        self._mean = torch.tensor(preprocessing["mean"]).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing["std"]).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, record: int) -> Tensor:
        """The image as uint8 `[3, H, W]`, or of other kinds than 8-bit RGB as values in 0..1, fp32 `[C, H, W]`.

        Raises:
            BadImage: it cannot be used, for the reason given.
        """
        return self.prepare(self.dataset.image(record))[0]

    def prepare(self, data: bytearray) -> tuple[Tensor, tuple[int, int]]:
        """What `load` makes of a file, and the upright width and height that it had.

        Raises:
            BadImage: it cannot be used, for the reason given.
        """
        if self.intake.is_rgb:
            inspect(data, self.intake.max_pixels)
            image = decode(data)
            return self.transform(image), image.size
        values, header = self.intake.open(data)
        rows, cols = header.size
        turned = upright(values, header.orientation).transpose(2, 0, 1).copy()
        return self.transform(torch.from_numpy(turned)), (cols, rows)

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
        """What `load` gives, `[B, C, H, W]` -> fp32 of mean 0 and deviation 1, on the same device."""
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        return self.brightness(images).sub(mean).div(std)

    def brightness(self, images: Tensor) -> Tensor:
        """What `load` gives as values in 0..1, fp32."""
        return images.float().div(255) if self.intake.is_rgb else images
