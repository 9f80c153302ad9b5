"""How the bytes of a sample become the values that a network sees; one rule for training and evaluation."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import DataConfig, ExperimentConfig
from pipeline.data.catalog import Catalog, Pixels, measuring
from pipeline.data.homes import catalog_of
from pipeline.data.images import Header, hide_exif, inspect
from pipeline.data.patterns import list_shards
from pipeline.data.remote.address import is_remote
from pipeline.data.values import decode_values, scaled
from pipeline.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for pixels in 0..1
STD = (0.229, 0.224, 0.225)
CHANNELS = 3
MAX_PIXELS = DataConfig().max_pixels  # where no run's config says otherwise


class Intake(NamedTuple):
    """What is taken of a sample, and how its values are normalised.

    Attributes:
        channels: of the image.
        value_range: what becomes 0 and 1; None for 8-bit RGB, which DALI decodes.
        mean, std: by channel, of values in 0..1.
        image: which image of a sample that has several, see `tars.Sample`.
        max_pixels: larger images count as bad.
    """

    channels: int = CHANNELS
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    image: str | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, data: DataConfig, channels: int = CHANNELS) -> "Intake":
        """As an experiment has it whose values are settled (see `settle_values`)."""
        assert channels == CHANNELS or (data.value_range and data.mean and data.std), "settle_values comes first"
        return cls(channels, data.value_range, data.mean or MEAN, data.std or STD, data.image, data.max_pixels)

    @classmethod
    def of_experiment(cls, config: ExperimentConfig) -> "Intake":
        return cls.of(config.data, config.model.in_chans)

    @property
    def is_rgb(self) -> bool:
        """8-bit RGB, which DALI decodes; all else is decoded by `values`."""
        return self.value_range is None

    @property
    def bytes_per_pixel(self) -> int:
        """When decoded."""
        return CHANNELS if self.is_rgb else 4 * self.channels

    def open(self, data: bytearray) -> tuple[Any, Header]:
        """An image for the augmentation: the file with its EXIF hidden, or values in 0..1, fp32 `[H, W, C]`.

        Raises:
            BadImage: it cannot be used.
        """
        if self.value_range is None:
            header = inspect(data, self.max_pixels)
            hide_exif(data, header)
            return data, header
        pixels, header = decode_values(data, self.max_pixels, self.channels)
        return scaled(pixels, self.value_range), header


def settle_values(config: ExperimentConfig) -> ExperimentConfig:
    """Fill in range, mean and deviation from the catalogs of the training shards, unless images are 8-bit RGB.

    Raises:
        UserError: they are neither in the experiment nor in a catalog, or of another number of channels.
    """
    data, channels = config.data, config.model.in_chans
    if channels == CHANNELS and data.value_range is None:
        return config
    own = {"value_range": data.value_range, "mean": data.mean, "std": data.std}
    if all(own.values()):
        return config
    found = _statistics(data, channels).scaled(data.value_range)
    filled = {key: value if value is not None else found[key] for key, value in own.items()}
    return config.model_copy(update={"data": data.model_copy(update=filled)})


def _statistics(data: DataConfig, channels: int) -> Pixels:
    parts = []
    for folder in dict.fromkeys(map(os.path.dirname, list_shards(data.train))):
        listing: Catalog | None = catalog_of(folder)
        if listing is None or listing.pixels is None:
            how = "poa shards stats on a disk, and copy the catalog" if is_remote(folder) else measuring(folder or ".")
            fix = f"{how}, or set data.value_range, data.mean and data.std"
            raise UserError("the shards have no statistics of their values", folder or ".", fix)
        if len(listing.pixels.mean) != channels:
            what = f"images of {len(listing.pixels.mean)} channels, and model.in_chans is {channels}"
            raise UserError(what, folder or ".", "set model.in_chans, or poa shards stats SHARDS anew")
        parts.append(listing.pixels)
    return Pixels.joined(parts)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`[H, W, C]` as its EXIF orientation has it."""
    turn: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    return turn[orientation](pixels) if orientation in turn else pixels
