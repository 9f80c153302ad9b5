"""Elastic Swin: timm's SwinTransformer, first-stage channels and blocks per stage."""

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from kernels.attention import attention
from pipeline.config import ModelConfig
from pipeline.elastic.backbone import Backbone, ElasticBlock, Features
from pipeline.elastic.layers import (
    ELASTIC,
    ElasticLinear,
    ElasticMergedNorm,
    ElasticPatchEmbed,
    ElasticQKV,
    ElasticReduction,
    leading,
    make_elastic,
)
from pipeline.elastic.maps import mask_grid, put_mask_token, spread
from pipeline.elastic.stochastic_depth import Kept, Layout, add_branch, kept_rows
from pipeline.elastic.subnet import Subnet, kept, largest_subnet, mlp_ratio
from pipeline.elastic.windows import Windows, from_windows, to_windows, windows


def _maps(x: Tensor, layout: Layout) -> list[Tensor]:
    """Packed tokens `[T, C]` -> per crop group, the map `[B, H, W, C]`."""
    parts = x.split([prod(sides) for sides in layout])
    return [part.view(*sides, -1) for part, sides in zip(parts, layout, strict=True)]


class ElasticWindowAttention(WindowAttention):
    """Attention within windows; a sub-network has the leading heads and their relative-position biases."""

    impl: str
    head_dim: int
    qkv: ElasticQKV
    proj: ElasticLinear
    relative_position_bias_table: nn.Parameter

    def forward(self, groups: list[Tensor], geometries: Sequence[Windows], shifted: bool) -> list[Tensor]:
        """Per crop group, tokens in window order `[T_g, C]` -> `[T_g, C]`; linear layers on all groups at once."""
        width = groups[0].shape[-1]
        counts = [group.shape[0] for group in groups]
        qkv = self.qkv(torch.cat(groups) if len(groups) > 1 else groups[0], 3 * width)
        mixed = []
        for part, geometry in zip(qkv.split(counts), geometries, strict=True):
            windowed = part.view(-1, prod(geometry.size), 3, width // self.head_dim, self.head_dim)
            mask = geometry.mask if shifted else None
            bias = self._bias(geometry, width // self.head_dim)
            mixed.append(attention(windowed, bias=bias, mask=mask, impl=self.impl).flatten(0, 1))
        return list(self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0], width).split(counts))

    def _bias(self, geometry: Windows, heads: int) -> Tensor:
        """`[heads, N, N]`."""
        table = leading(self.relative_position_bias_table, heads)
        if geometry.resize is not None:
            table = (geometry.resize @ table.float()).to(table.dtype)
        area = prod(geometry.size)
        return table[geometry.rows].view(area, area, heads).permute(2, 0, 1).contiguous()


class ElasticSwinBlock(ElasticBlock, SwinTransformerBlock):
    """Window attention and MLP over packed tokens; odd blocks shift their windows."""

    attn: ElasticWindowAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    shifted: bool

    def _body(
        self,
        x: Tensor,
        *,
        layout: Layout,
        geometries: Sequence[Windows],
        kept: tuple[Kept | None, Kept | None],
        ratio: int,
    ) -> tuple[Tensor]:
        def attend(tokens: Tensor, tokens_layout: Layout) -> Tensor:
            maps = _maps(self.norm1(tokens), tokens_layout)
            groups = [to_windows(x, geometry, self.shifted) for x, geometry in zip(maps, geometries, strict=True)]
            groups = self.attn(groups, geometries, self.shifted)
            back = [
                from_windows(group, height, width, geometry, self.shifted).flatten(0, 2)
                for group, (_, height, width), geometry in zip(groups, tokens_layout, geometries, strict=True)
            ]
            return torch.cat(back)

        def feed_forward(tokens: Tensor, _: Layout) -> Tensor:
            return self.mlp(self.norm2(tokens), ratio)

        x = add_branch(x, layout, attend, kept[0], impl=self.residual)
        return (add_branch(x, layout, feed_forward, kept[1], impl=self.residual),)


class ElasticPatchMerging(PatchMerging):
    """Halve the map and double the channels."""

    norm: ElasticMergedNorm
    reduction: ElasticReduction

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Packed `[T, C]` -> `[T / 4, 2 C]` and its layout."""
        width = x.shape[-1]
        halved = tuple((batch, height // 2, cols // 2) for batch, height, cols in layout)
        merged = [
            group.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5).reshape(-1, 4 * width)
            for group in _maps(x, layout)
        ]
        return self.reduction(self.norm(torch.cat(merged)), 2 * width), halved


class ElasticSwin(Backbone, SwinTransformer):
    """The largest Swin of a grid."""

    architecture = "swin_base_patch4_window7_224"
    pool = "avg"
    layers: nn.Sequential
    patch_embed: ElasticPatchEmbed
    norm: nn.Module

    def elastic_blocks(self) -> Sequence[ElasticSwinBlock]:
        return [cast(ElasticSwinBlock, block) for stage in self._stages() for block in stage.blocks]

    def _stages(self) -> list[Any]:
        return list(self.layers)

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        self._check(subnet)
        maps = [self._embed(x, mask, subnet.width) for x, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        layout: Layout = tuple(tuple(x.shape[:3]) for x in maps)
        x, done = torch.cat([x.flatten(0, 2) for x in maps]), 0
        for stage, active in zip(self._stages(), kept(self.config, subnet), strict=True):
            if stage is not self.layers[0]:
                x, layout = stage.downsample(x, layout)
            blocks = len(stage.blocks)
            rows = kept_rows([k[2 * done : 2 * (done + blocks)] for k in keep] if keep else None, layout)
            options = {"layout": layout, "ratio": mlp_ratio(self.config, subnet)}
            x = self._run_stage(x, stage, active, rows, options)
            done += blocks
        last = _maps(self.norm(x), layout)
        return [Features(group.mean((1, 2)), spread(group)) for group in last]

    def _run_stage(
        self, x: Tensor, stage: Any, active: tuple[int, ...], rows: list[Kept] | None, options: dict[str, Any]
    ) -> Tensor:
        table = stage.blocks[0].attn.window_size[0]
        geometries = tuple(windows(*sides, self.config.window_size, table, x.device) for _, *sides in options["layout"])
        for i, block in enumerate(stage.blocks):
            if i in active or self.sharded:
                pair = (rows[2 * i], rows[2 * i + 1]) if rows else (None, None)
                (x,) = block(x, geometries=geometries, kept=pair, active=i in active, **options)
        return x

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, H/p, W/p, width]`, masked cells replaced."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        x = self.patch_embed(images, width)
        return x if mask is None else put_mask_token(x, mask, leading(self.mask_token, width), grid)

    def feature_dim(self, subnet: Subnet) -> int:
        return subnet.width * 8

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return mask_grid(height, width, self.config.stride)

    def layer_id(self, name: str) -> int:
        """As documented on Backbone; patch merging belongs to the first block of its stage."""
        if not name.startswith("layers."):
            return self.num_layers if name.startswith("norm.") else 0
        _, stage, kind, *rest = name.split(".")
        before = sum(len(s.blocks) for s in self._stages()[: int(stage)])
        return before + 1 + (int(rest[0]) if kind == "blocks" else 0)

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        return swin_args(self.config, subnet)

    def source_name(self, name: str, subnet: Subnet) -> str:
        parts = name.split(".")
        if parts[0] == "layers" and parts[2:3] == ["blocks"] and parts[3:]:
            stage = int(parts[1])
            parts[3] = str(kept(self.config, subnet)[stage][int(parts[3])])
        return ".".join(parts)


def swin_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": subnet.width,
        "depths": list(subnet.depths),
        "num_heads": [subnet.width * 2**stage // config.head_dim for stage in range(4)],
        "mlp_ratio": mlp_ratio(config, subnet),
        "window_size": config.window_size,
        "drop_path_rate": 0.0,
        "global_pool": "avg",
        "num_classes": 0,
    }


def build(
    config: ModelConfig, *, attention: str, residual: str, activation_checkpointing: bool, sharded: bool
) -> ElasticSwin:
    """Build an elastic Swin; see `pipeline.elastic.build`."""
    subnet = largest_subnet(config)
    model = ElasticSwin(**swin_args(config, subnet))
    make_elastic(
        model,
        {
            **ELASTIC,
            WindowAttention: ElasticWindowAttention,
            SwinTransformerBlock: ElasticSwinBlock,
            PatchMerging: ElasticPatchMerging,
        },
    )
    for stage in model._stages():
        for i, block in enumerate(stage.blocks):
            block.shifted = i % 2 == 1
            block.attn.impl, block.residual, block.attn.head_dim = attention, residual, config.head_dim
            block.attn.qkv.__class__ = ElasticQKV
        if isinstance(stage.downsample, ElasticPatchMerging):
            stage.downsample.norm.__class__ = ElasticMergedNorm
            stage.downsample.reduction.__class__ = ElasticReduction
    model.num_layers = len(model.elastic_blocks()) + 1
    model.num_draws = 2 * len(model.elastic_blocks())
    model._configure(config, subnet.width, sharded, activation_checkpointing)
    return model
