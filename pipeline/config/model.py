"""The section `model:`: the elastic backbone, its largest network and the grid of its sub-networks."""

from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Changeable, PathText, Section, is_section

BUNDLE = "bundle.json"
"""By which a directory is known for one that `poa extract --bundle` wrote."""

Family = Literal["vit", "eva", "swin", "resnet"]

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {
        "width": {"min": 384, "max": 1024, "step": 64},
        "depth": {"min": 12, "max": 24, "step": 1},
    },
    "eva": {
        "width": {"min": 384, "max": 1024, "step": 64},
        "depth": {"min": 12, "max": 24, "step": 1},
        "registers": 4,
    },
    "swin": {
        "patch_size": 4,
        "head_dim": 16,
        "width": {"min": 96, "max": 128, "step": 16},
        "depth": {"min": 6, "max": 18, "step": 1},
        "layer_scale": None,
    },
    "resnet": {
        "patch_size": 4,
        "width": {"min": 64, "max": 128, "step": 32},
        "depth": {"min": [3, 4, 6, 3], "max": [3, 8, 36, 3], "step": 1},
        "layer_scale": None,
    },
}
LARGEST_GRID = 100_000
"""Sub-networks; the paper's largest grid has 465. Far beyond it lies a typing error that would fill the memory."""
UNUSED_KEYS = {
    "vit": ("window_size", "swiglu"),
    "eva": ("window_size",),
    "swin": ("layer_scale", "registers", "swiglu"),
    "resnet": (
        "patch_size",
        "head_dim",
        "window_size",
        "layer_scale",
        "registers",
        "swiglu",
    ),  # its stem takes every fourth pixel
}


def is_bundle(source: str) -> bool:
    """Whether `model.init_from` names a bundle, which brings heads and teacher along, rather than timm's weights."""
    return Path(source, BUNDLE).is_file()


class Span(Section):
    """An inclusive range of integers."""

    min: int = Field(gt=0)
    max: int = Field(gt=0)
    step: int = Field(gt=0)

    @model_validator(mode="after")
    def _ends_meet(self) -> "Span":
        if self.min > self.max or (self.max - self.min) % self.step:
            raise ValueError(f"{self.min}..{self.max} is not reached in steps of {self.step}: change min, max or step")
        return self

    def __len__(self) -> int:
        return (self.max - self.min) // self.step + 1

    def values(self) -> tuple[int, ...]:
        return tuple(range(self.min, self.max + 1, self.step))


class DepthSpan(Section):
    """Blocks per stage: one integer (ViT; the third stage of Swin) or a list with one entry per stage."""

    min: int | list[int]
    max: int | list[int]
    step: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _same_stages(self) -> "DepthSpan":
        if isinstance(self.min, list) != isinstance(self.max, list) or len(self._list(self.min)) != len(
            self._list(self.max)
        ):
            raise ValueError("min and max must have the same number of stages")
        for low, high in zip(self._list(self.min), self._list(self.max), strict=True):
            if low < 1 or low > high or (high - low) % self.step:
                raise ValueError(f"{low}..{high} is not reached in steps of {self.step}: change min, max or step")
        return self

    def __len__(self) -> int:
        """How many choices there are over all stages."""
        pairs = zip(self._list(self.min), self._list(self.max), strict=True)
        return prod((high - low) // self.step + 1 for low, high in pairs)

    @staticmethod
    def _list(value: int | list[int]) -> list[int]:
        return value if isinstance(value, list) else [value]

    def ranges(self) -> tuple[tuple[int, ...], ...]:
        pairs = zip(self._list(self.min), self._list(self.max), strict=True)
        return tuple(tuple(range(low, high + 1, self.step)) for low, high in pairs)


class ModelConfig(Section):
    """The elastic backbone: the largest network and the grid of its sub-networks."""

    family: Family = "vit"
    image_size: int = Field(224, gt=0)
    patch_size: int = Field(16, gt=0)
    in_chans: int = Field(3, gt=0)
    head_dim: int = Field(64, gt=0)
    width: Span
    depth: DepthSpan
    drop_path: Changeable[float] = Field(0.2, ge=0, lt=1)
    layer_scale: float | None = Field(1.0e-5, gt=0)
    init_from: PathText | None = None
    window_size: int = Field(7, gt=0)
    registers: int = Field(0, ge=0, description="tokens beside that of the class which belong to no patch")
    swiglu: bool = Field(False, description="gated MLP of the same hidden units (DINOv3's plus sizes)")

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill what is left out of the file, single keys of `width` and `depth` included."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None or not is_section(cls, key)}
        merged = {**FAMILY_DEFAULTS.get(str(values.get("family", "vit")), {}), **given}
        for name in ("width", "depth"):
            default = FAMILY_DEFAULTS.get(str(values.get("family", "vit")), {}).get(name)
            if isinstance(merged.get(name), dict) and default:
                merged[name] = {**default, **merged[name]}
        return merged

    @model_validator(mode="after")
    def _grid_is_finite(self) -> "ModelConfig":
        if len(self.width) * len(self.depth) > LARGEST_GRID:
            raise ValueError(
                f"{len(self.width) * len(self.depth)} sub-networks are more than {LARGEST_GRID}: "
                "use larger steps of width and depth"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_key(self) -> "ModelConfig":
        """A key that the family does not read holds its default, as it does in a resolved config."""
        for name in UNUSED_KEYS[self.family]:
            default = FAMILY_DEFAULTS[self.family].get(name, type(self).model_fields[name].default)
            if getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect on {self.family}: leave it out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.family != "resnet":
            for name in ("min", "max", "step"):
                width = getattr(self.width, name)
                if width % self.head_dim and not (name == "step" and self.width.min == self.width.max):
                    raise ValueError(
                        f"width.{name}={width} is not a multiple of head_dim={self.head_dim}: "
                        "every sub-network keeps whole heads, so change one of the two"
                    )
        elif self.width.min % 32 or self.width.max % 32 or (self.width.max > self.width.min and self.width.step % 32):
            raise ValueError("ResNet widths must be multiples of 32 (groups of its GroupNorm): change width")
        stages = len(self.depth_ranges)
        if stages != (1 if self.one_stage else 4):
            raise ValueError(f"depth has {stages} stages: {self.family} wants {1 if self.one_stage else 4}")
        if self.family == "eva" and self.head_dim % 4:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide into pairs of channels for rows and for columns: "
                f"use {self.head_dim // 4 * 4 + 4}"
            )
        if self.family == "eva" and self.layer_scale is None:
            raise ValueError("layer_scale=null: DINOv3's networks have one: give a number, such as 1.0e-5")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by {self.stride} (the network's total stride): "
                f"use {max(self.image_size // self.stride, 1) * self.stride}"
            )
        return self

    def alone(self, width: int | None = None, depths: tuple[int, ...] | None = None) -> "ModelConfig":
        """The grid that holds nothing but one network of this one, the largest if none is named."""
        width = width or self.width.max
        listed = list(depths) if depths and not self.one_stage else depths[0] if depths else self.depth.max
        return self.model_copy(
            update={
                "width": Span(min=width, max=width, step=self.width.step),
                "depth": DepthSpan(min=listed, max=listed, step=self.depth.step),
            }
        )

    @property
    def one_stage(self) -> bool:
        """Whether all blocks are alike, over tokens of one size."""
        return self.family in ("vit", "eva")

    @property
    def widths(self) -> tuple[int, ...]:
        return self.width.values()

    @property
    def depth_ranges(self) -> tuple[tuple[int, ...], ...]:
        """Choices of depth, one tuple per stage."""
        ranges = self.depth.ranges()
        if self.family == "swin" and len(ranges) == 1:
            return ((2,), (2,), ranges[0], (2,))
        return ranges

    @property
    def stride(self) -> int:
        """Pixels per side of the coarsest map; crops must be multiples of it."""
        return self.patch_size if self.one_stage else self.patch_size * 8
