"""Where the images come from and what is done to them before the network sees them."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.section import Changeable, Free, LocalPath, PathText, Section, Shards

Fraction = tuple[float, float]


class CropConfig(Section):
    """Side in pixels and range of the area, as a fraction of the image's."""

    size: Changeable[int] = Field(224, gt=0)
    scale: Changeable[Fraction] = (0.32, 1.0)

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "CropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must rise within (0, 1]")
        return self


class LocalCropConfig(CropConfig):
    count: Changeable[int] = Field(8, ge=0)
    size: Changeable[int] = Field(96, gt=0)
    scale: Changeable[Fraction] = (0.05, 0.32)


class SourceConfig(Section):
    """One of several sets of shards that are trained on together."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    url: PathText
    weight: float = Field(1, gt=0)


class CacheConfig(Section):
    """Where a node keeps what its ranks read from stores."""

    folder: LocalPath | None = Field(None, description="on a local disk of every node; null: nothing is kept")
    gb: float = Field(100, gt=0, description="of 10^9 bytes, for all ranks of a node together")
    patience_s: float = Field(600, gt=0, description="for which a read is tried again, in a store or on a disk")


class DataConfig(Section):
    """Shards, crops and augmentation. `batch_size` counts images per rank."""

    train: Free[Shards | Annotated[list[SourceConfig], Field(min_length=1)]] = Field(
        "shards/train-{000000..000999}.tar", description="patterns of shards, or several sources with weights"
    )
    segment: Free[int] = Field(0, ge=0, description="raised by one, the run goes on with other sources or weights")
    val: Free[Shards | None] = None
    image: str | None = Field(
        None, pattern=r"^[^\s/]+$", description="which image of a sample with several: `input.jpg`, or `input`"
    )
    batch_size: Free[int] = Field(50, gt=0)
    global_crops: CropConfig = CropConfig()
    local_crops: LocalCropConfig = LocalCropConfig()
    threads: Free[int] = Field(4, gt=0, description="that decode and augment, per rank")
    read_ahead: Free[int] = Field(
        4, gt=0, le=64, description="batches that are read at once, before they are asked for"
    )
    reads: Free[int | None] = Field(
        None, gt=0, le=256, description="samples of a batch that are read at once; null: 1 from a disk, 32 from a store"
    )
    seed: int = Field(0, ge=0)
    max_pixels: Changeable[int] = Field(178956970, gt=0, description="of an image; a larger one counts as bad")
    batch_pixels: Changeable[int] = Field(
        2_000_000_000, gt=0, description="of the images of a rank's batch; one with more is made on the CPU, in parts"
    )
    window: int = Field(16, gt=0, description="shards, or pieces of them, whose samples are permuted together")
    lanes: Free[int] = Field(1, gt=0, le=65536, description="into which the set is divided, e.g. the number of nodes")
    piece_mb: Free[int] = Field(0, ge=0, le=65536, description="of what is permuted and fetched as one; 0: shards")
    cache: Free[CacheConfig] = CacheConfig()
    hue: Changeable[Literal["yiq", "hsv"]] = "yiq"
    blur: Changeable[tuple[float, float, float]] = Field(
        (0.0, 0.9, 0.5), description="probability: global 1, global 2, local"
    )

    value_range: Fraction | None = Field(
        None, description="values that become 0 and 1; null: 8-bit RGB, or what poa shards stats found"
    )
    mean: tuple[float, ...] | None = Field(None, description="by channel, of values in 0..1; null: ImageNet's or found")
    std: tuple[float, ...] | None = Field(None, description="by channel, likewise")
    channel_drop: Changeable[float] = Field(
        0, ge=0, lt=1, description="probability that a crop's channel is set to its mean"
    )

    @field_validator("value_range")
    @classmethod
    def _range_rises(cls, value: Fraction | None) -> Fraction | None:
        if value and value[0] >= value[1]:
            raise ValueError(f"value_range={list(value)} must rise, e.g. [0, 4095] for 12 bits")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value and min(value) <= 0:
            raise ValueError(f"std={list(value)} must be above 0")
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        """Read sources one by one, so that a mistake in one is named and not all that `train` could have been."""
        if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
            return value
        sources = [_source(number, item) for number, item in enumerate(value)]
        names = [source.name for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sources are called {twice[0]}: give each a name of its own")
        return sources

    @field_validator("blur")
    @classmethod
    def _probabilities(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= p <= 1 for p in value):
            raise ValueError("blur holds three probabilities within [0, 1]")
        return value


def _source(number: int, item: Any) -> SourceConfig:
    if isinstance(item, SourceConfig):
        return item
    try:
        return SourceConfig.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "entry"
        message = first["msg"].removeprefix("Value error, ")
        if "extra" in first["type"]:
            message = f"there is no such key: use {', '.join(SourceConfig.model_fields)}"
        raise ValueError(f"{key} of source {number + 1}, {message}") from error
