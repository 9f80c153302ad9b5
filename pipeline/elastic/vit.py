"""Elastic ViT: timm's VisionTransformer with class token, registers, LayerScale and learned positions (DINOv2)."""

from typing import Any, cast

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from kernels.attention import attention
from pipeline.config import ModelConfig
from pipeline.elastic.backbone import ElasticBlock
from pipeline.elastic.layers import ELASTIC, ElasticLinear, ElasticQKV, leading, make_elastic
from pipeline.elastic.stochastic_depth import Kept, Layout, add_branch
from pipeline.elastic.subnet import Subnet
from pipeline.elastic.tokens import TokenBackbone, token_args


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

    def _body(self, x: Tensor, *, layout: Layout, kept: tuple[Kept | None, Kept | None], ratio: int) -> tuple[Tensor]:
        def attend(tokens: Tensor, tokens_layout: Layout) -> Tensor:
            return self.attn(self.norm1(tokens), tokens_layout)

        def feed_forward(tokens: Tensor, _: Layout) -> Tensor:
            return self.mlp(self.norm2(tokens), ratio)

        x = add_branch(x, layout, attend, kept[0], self.ls1, impl=self.residual)
        return (add_branch(x, layout, feed_forward, kept[1], self.ls2, impl=self.residual),)


class ElasticViT(TokenBackbone, VisionTransformer):
    """The largest ViT of a grid."""

    architecture = "vit_base_patch16_224"
    pos_embed: nn.Parameter

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        """As documented on `TokenBackbone`. Positions have one for the class token unless there are registers."""
        x = self._patches(images, mask, width)
        positions = resample_abs_pos_embed(
            leading(self.pos_embed, width),
            new_size=list(self.patch_grid((images.shape[2], images.shape[3]))),
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=0 if self.config.registers else 1,
        )
        return self._in_front(x + positions) if self.config.registers else self._in_front(x) + positions

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        return vit_args(self.config, subnet)


def vit_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network."""
    return {
        **token_args(config, subnet),
        "reg_tokens": config.registers,
        "no_embed_class": config.registers > 0,
        "dynamic_img_size": True,
    }


def build(
    config: ModelConfig, *, attention: str, residual: str, activation_checkpointing: bool, sharded: bool
) -> ElasticViT:
    """Build an elastic ViT; see `pipeline.elastic.build`."""
    subnet = Subnet(config.widths[-1], (config.depth_ranges[0][-1],))
    model = ElasticViT(**vit_args(config, subnet))
    make_elastic(model, {**ELASTIC, Attention: ElasticAttention, Block: ElasticViTBlock})
    blocks = model.elastic_blocks()
    for block in blocks:
        attn = cast(ElasticAttention, block.attn)
        attn.impl, block.residual = attention, residual
        attn.qkv.__class__ = ElasticQKV
    model.num_layers, model.num_draws = len(blocks) + 1, 2 * len(blocks)
    model._configure(config, subnet.width, sharded, activation_checkpointing)
    return model
