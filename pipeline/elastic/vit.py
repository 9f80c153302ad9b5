"""Elastic ViT: timm's VisionTransformer with a class token, LayerScale and learned positions."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from kernels.attention import attention
from pipeline.config import ModelConfig
from pipeline.elastic.backbone import Backbone, ElasticBlock, Features
from pipeline.elastic.layers import ELASTIC, ElasticLinear, ElasticPatchEmbed, ElasticQKV, leading, make_elastic
from pipeline.elastic.stochastic_depth import Kept, Layout, add_branch, kept_rows
from pipeline.elastic.subnet import Subnet, kept_blocks


class ElasticAttention(Attention):
    """Self-attention over packed tokens: linear layers on all of them, attention per crop group."""

    impl: str
    qkv: ElasticQKV
    proj: ElasticLinear

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[T, C]` -> `[T, C]`, T the tokens of all crop groups of `layout`."""
        width = x.shape[-1]
        qkv = self.qkv(x, 3 * width)
        groups = qkv.split([batch * tokens for batch, tokens in layout])
        mixed = [
            attention(group.view(batch, tokens, 3, -1, self.head_dim), impl=self.impl).flatten(0, 1)
            for group, (batch, tokens) in zip(groups, layout, strict=True)
        ]
        return self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0], width)


class ElasticViTBlock(ElasticBlock, Block):
    """Pre-norm transformer block over packed tokens."""

    attn: ElasticAttention
    norm1: nn.Module
    norm2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    mlp: nn.Module

    def _body(self, x: Tensor, *, layout: Layout, kept: tuple[Kept | None, Kept | None]) -> tuple[Tensor]:
        def attend(tokens: Tensor, tokens_layout: Layout) -> Tensor:
            return self.attn(self.norm1(tokens), tokens_layout)

        def feed_forward(tokens: Tensor, _: Layout) -> Tensor:
            return self.mlp(self.norm2(tokens))

        x = add_branch(x, layout, attend, kept[0], self.ls1, impl=self.residual)
        return (add_branch(x, layout, feed_forward, kept[1], self.ls2, impl=self.residual),)


class ElasticViT(Backbone, VisionTransformer):
    """The largest ViT of a grid."""

    architecture = "vit_base_patch16_224"
    pool = "token"
    blocks: nn.Sequential
    patch_embed: ElasticPatchEmbed
    pos_embed: nn.Parameter
    cls_token: nn.Parameter
    norm: nn.Module

    def elastic_blocks(self) -> Sequence[ElasticViTBlock]:
        return [cast(ElasticViTBlock, block) for block in self.blocks]

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        self._check(subnet)
        groups = [
            self._embed(x, mask, subnet.width) for x, mask in zip(crops, masks or [None] * len(crops), strict=True)
        ]
        layout = tuple((x.shape[0], x.shape[1]) for x in groups)
        x = torch.cat([group.flatten(0, 1) for group in groups])
        kept = kept_rows(keep, layout)
        active = kept_blocks(subnet.depths[0], len(self.blocks))
        for i, block in enumerate(self.blocks):
            if i in active or self.sharded:
                pair = (kept[2 * i], kept[2 * i + 1]) if kept else (None, None)
                (x,) = block(x, layout=layout, kept=pair, active=i in active)
        tokens = self.norm(x).split([batch * count for batch, count in layout])
        views = [group.view(*sides, -1) for group, sides in zip(tokens, layout, strict=True)]
        return [Features(view[:, 0], view[:, 1:]) for view in views]

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, 1 + N, width]`: masked patches replaced, class token in front, positions added."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        x = self.patch_embed(images, width).flatten(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], leading(self.mask_token, width).to(x.dtype), x)
        positions = resample_abs_pos_embed(
            leading(self.pos_embed, width), new_size=list(grid), old_size=list(self.patch_embed.grid_size)
        )
        cls = leading(self.cls_token, width).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1) + positions

    def feature_dim(self, subnet: Subnet) -> int:
        return subnet.width

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"images: expected sides divisible by the patch size {patch}, got {height}x{width}")
        return height // patch, width // patch

    def layer_id(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers if name.startswith("norm.") else 0

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        return vit_args(self.config, subnet)

    def source_name(self, name: str, subnet: Subnet) -> str:
        if not name.startswith("blocks."):
            return name
        _, index, *rest = name.split(".")
        kept = kept_blocks(subnet.depths[0], len(self.blocks))
        return ".".join(["blocks", str(kept[int(index)]), *rest])


def vit_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": subnet.width,
        "depth": subnet.depths[0],
        "num_heads": subnet.width // config.head_dim,
        "init_values": config.layer_scale,
        "dynamic_img_size": True,
        "global_pool": "token",
        "num_classes": 0,
    }


def build(
    config: ModelConfig, *, attention: str, residual: str, activation_checkpointing: bool, sharded: bool
) -> ElasticViT:
    """Build an elastic ViT; see `pipeline.elastic.build`."""
    subnet = Subnet(config.widths[-1], (config.depth_ranges[0][-1],))
    model = ElasticViT(**vit_args(config, subnet))
    make_elastic(model, {**ELASTIC, Attention: ElasticAttention, Block: ElasticViTBlock})
    for block in model.elastic_blocks():
        block.attn.impl, block.residual = attention, residual
        block.attn.qkv.__class__ = ElasticQKV
    model.num_layers = len(model.blocks) + 1
    model.num_draws = 2 * len(model.blocks)
    model._configure(config, subnet.width, sharded, activation_checkpointing)
    return model
