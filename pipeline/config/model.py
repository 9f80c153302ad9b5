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
SWIGLU_ALIGN = 8
"""Hidden units of a SwiGLU come in multiples of it, as in DINOv3."""
GROUPS = 32
"""Of ResNet's norms, each of which has whole channels."""
MLP_RATIO = {"min": 4, "max": 4, "step": 1}
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
        "mlp_ratio",
    ),  # its stem takes every fourth pixel
}


def _written(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value


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
    in_chans: int = Field(3, gt=0, le=16)
    head_dim: int = Field(64, gt=0)
    width: Span
    depth: DepthSpan
    drop_path: Changeable[float] = Field(0.2, ge=0, lt=1)
    layer_scale: float | None = Field(1.0e-5, gt=0)
    init_from: PathText | None = None
    init_order: Literal["none", "magnitude", "taylor"] = Field(
        "none", description="sort channels, heads, hidden units and blocks of init_from's weights by importance"
    )
    block_importance: list[list[float]] | None = Field(
        None, description="per stage, of each block: a depth keeps the most important; evenly spread ones if not set"
    )
    window_size: int = Field(7, gt=0)
    registers: int = Field(0, ge=0, description="tokens beside that of the class which belong to no patch")
    swiglu: bool = Field(False, description="gated MLP of the same hidden units (DINOv3's plus sizes)")
    mlp_ratio: Span = Field(Span(**MLP_RATIO), description="hidden units of an MLP per channel of its input")

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill what is left out of the file, single keys of `width` and `depth` included."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None or not is_section(cls, key)}
        merged = {**FAMILY_DEFAULTS.get(str(values.get("family", "vit")), {}), **given}
        defaults = {"mlp_ratio": MLP_RATIO, **FAMILY_DEFAULTS.get(str(values.get("family", "vit")), {})}
        for name in ("width", "depth", "mlp_ratio"):
            default = defaults.get(name)
            if isinstance(merged.get(name), dict) and default:
                merged[name] = {**default, **merged[name]}
        return merged

    @model_validator(mode="after")
    def _grid_is_finite(self) -> "ModelConfig":
        count = len(self.width) * len(self.depth) * len(self.mlp_ratio)
        if count > LARGEST_GRID:
            raise ValueError(
                f"{count} sub-networks are more than {LARGEST_GRID}: use larger steps of width, depth and mlp_ratio"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_key(self) -> "ModelConfig":
        """A key that the family does not read holds its default, as it does in a resolved config."""
        for name in UNUSED_KEYS[self.family]:
            default = FAMILY_DEFAULTS[self.family].get(name, type(self).model_fields[name].default)
            if getattr(self, name) != default:
                raise ValueError(f"{name}={_written(getattr(self, name))} has no effect on {self.family}: leave it out")
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
        elif self.width.min % GROUPS or (len(self.width) > 1 and self.width.step % GROUPS):
            raise ValueError(f"ResNet widths must be multiples of {GROUPS} (groups of its GroupNorm): change width")
        stages = len(self.depth_ranges)
        if stages != (1 if self.one_stage else 4):
            raise ValueError(f"depth has {stages} stages: {self.family} wants {1 if self.one_stage else 4}")
        if self.init_order != "none" and self.init_from is None:
            raise ValueError(
                f"init_order={self.init_order} sorts weights that there are: set init_from, or leave it out"
            )
        if self.block_importance is not None:
            given, blocks = ([*map(len, self.block_importance)], [choices[-1] for choices in self.depth_ranges])
            if given != blocks:
                raise ValueError(f"block_importance is of {given} blocks and the stages have {blocks}: leave it out")
        if self.family == "eva" and self.head_dim % 4:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide into pairs of channels for rows and for columns: "
                f"use {self.head_dim // 4 * 4 + 4}"
            )
        for ratio in self.mlp_ratio.values() if self.swiglu else ():
            if self.head_dim * ratio % SWIGLU_ALIGN:
                raise ValueError(
                    f"mlp_ratio {ratio} with head_dim={self.head_dim}: SwiGLU has hidden units in multiples of "
                    f"{SWIGLU_ALIGN}: change mlp_ratio"
                )
        if self.family == "eva" and self.layer_scale is None:
            raise ValueError("layer_scale=null: DINOv3's networks have one: give a number, such as 1.0e-5")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by {self.stride} (the network's total stride): "
                f"use {max(self.image_size // self.stride, 1) * self.stride}"
            )
        return self

    def alone(
        self, width: int | None = None, depths: tuple[int, ...] | None = None, ratio: int | None = None
    ) -> "ModelConfig":
        """The grid that holds nothing but one network of this one, the largest if none is named."""
        width, ratio = width or self.width.max, ratio or self.mlp_ratio.max
        listed = list(depths) if depths and not self.one_stage else depths[0] if depths else self.depth.max
        return self.model_copy(
            update={
                "width": Span(min=width, max=width, step=self.width.step),
                "depth": DepthSpan(min=listed, max=listed, step=self.depth.step),
                "mlp_ratio": Span(min=ratio, max=ratio, step=self.mlp_ratio.step),
                "block_importance": None if depths else self.block_importance,
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
