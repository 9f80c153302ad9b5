"""Elastic Eva as DINOv3 has it: rotary positions, registers, LayerScale, no biases of queries, keys and values."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from timm.layers import LayerNorm, RotaryEmbeddingDinoV3, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from kernels.attention import attention
from pipeline.config import ModelConfig
from pipeline.config.model import SWIGLU_ALIGN
from pipeline.elastic.backbone import ElasticBlock
from pipeline.elastic.layers import ELASTIC, ElasticLayerScale, ElasticLinear, ElasticQKV, make_elastic
from pipeline.elastic.stochastic_depth import Kept, Layout, add_branch
from pipeline.elastic.subnet import Subnet, largest_subnet
from pipeline.elastic.tokens import TokenBackbone, token_args

TEMPERATURE = 100.0
EPS = 1e-5
_TABLES = 64  # image sizes whose rotations are kept


class ElasticEvaAttention(EvaAttention):
    """Self-attention over packed tokens, queries and keys turned by the positions of their patches."""

    impl: str
    qkv: ElasticQKV
    proj: ElasticLinear

    def forward(self, x: Tensor, layout: Layout, tables: Sequence[Tensor]) -> Tensor:
        """`[T, C]` -> `[T, C]`, T the tokens of all crop groups of `layout`; `tables` as `rotations` makes them."""
        width = x.shape[-1]
        groups = self.qkv(x, 3 * width).split([batch * tokens for batch, tokens in layout])
        mixed = []
        for group, (batch, tokens), table in zip(groups, layout, tables, strict=True):
            qkv = group.view(batch, tokens, 3, -1, self.head_dim)
            turned = torch.cat([rotate(qkv[:, :, :2], table), qkv[:, :, 2:]], dim=2)
            mixed.append(attention(turned, impl=self.impl).flatten(0, 1))
        return self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0], width)


class ElasticSwiGLU(SwiGLU):
    """Gated hidden units, in proportion to the input width."""

    fc1_g: ElasticLinear
    fc1_x: ElasticLinear
    fc2: ElasticLinear

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """`[..., C]` -> `[..., C]` by way of the first `ratio` C hidden units."""
        width, hidden = x.shape[-1], ratio * x.shape[-1]
        return self.fc2(self.act(self.fc1_g(x, hidden)) * self.fc1_x(x, hidden), width)


class ElasticEvaBlock(ElasticBlock, EvaBlock):
    """Pre-norm transformer block over packed tokens."""

    attn: ElasticEvaAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls1: "HeldByBlock"
    ls2: "HeldByBlock"

    def _body(
        self, x: Tensor, *, layout: Layout, kept: tuple[Kept | None, Kept | None], ratio: int, tables: Sequence[Tensor]
    ) -> tuple[Tensor]:
        def attend(tokens: Tensor, tokens_layout: Layout) -> Tensor:
            return self.attn(self.norm1(tokens), tokens_layout, tables)

        def feed_forward(tokens: Tensor, _: Layout) -> Tensor:
            return self.mlp(self.norm2(tokens), ratio)

        x = add_branch(x, layout, attend, kept[0], self.ls1, impl=self.residual)
        return (add_branch(x, layout, feed_forward, kept[1], self.ls2, impl=self.residual),)


class HeldByBlock(ElasticLayerScale):
    """LayerScale whose factors are a parameter of the block itself, as timm names it here."""

    def __init__(self, block: EvaBlock, name: str):
        nn.Module.__init__(self)
        self._owner = (block, name)

    @property
    def gamma(self) -> nn.Parameter:
        block, name = self._owner
        return cast(nn.Parameter, getattr(block, name))


class ElasticEva(TokenBackbone, Eva):
    """The largest Eva of a grid."""

    architecture = "vit_base_patch16_dinov3"

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        return self._in_front(self._patches(images, mask, width))

    def _positions(self, grids: Sequence[tuple[int, int]], device: torch.device) -> dict[str, Any]:
        return {"tables": [rotations(self.config.head_dim, grid, 1 + self.config.registers, device) for grid in grids]}

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        return eva_args(self.config, subnet)


@lru_cache(maxsize=_TABLES)
def rotations(head_dim: int, grid: tuple[int, int], in_front: int, device: torch.device) -> Tensor:
    """Cosines and sines `[2, in_front + N, 1, 1, head_dim]` in fp32 by which queries and keys are turned.

    The tokens in front have no position and stay as they are.
    """
    with torch.inference_mode(False), torch.no_grad():  # whoever asks first, training takes them too
        embedding = RotaryEmbeddingDinoV3(head_dim, temperature=TEMPERATURE, rotate_half=True)
        sines, cosines = embedding.get_embed(list(grid)).float().chunk(2, -1)
        still = torch.ones(in_front, head_dim)
        table = torch.stack([torch.cat([still, cosines]), torch.cat([0 * still, sines])])
        return table[:, :, None, None].to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """`[B, T, P, H, D]` turned by `rotations`, in the dtype of `x`."""
    first, second = x.chunk(2, -1)
    return (x * table[0] + torch.cat([-second, first], -1) * table[1]).to(x.dtype)


def eva_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network, beyond those of `architecture`."""
    return {
        **token_args(config, subnet),
        "num_reg_tokens": config.registers,
        "swiglu_mlp": config.swiglu,
        "swiglu_align_to": SWIGLU_ALIGN if config.swiglu else 0,
    }


def build(
    config: ModelConfig, *, attention: str, residual: str, activation_checkpointing: bool, sharded: bool
) -> ElasticEva:
    """Build an elastic Eva; see `pipeline.elastic.build`."""
    subnet = largest_subnet(config)
    model = ElasticEva(
        dynamic_img_size=True,
        qkv_bias=False,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=TEMPERATURE,
        rope_rotate_half=True,
        use_fc_norm=False,
        norm_layer=partial(LayerNorm, eps=EPS),
        **eva_args(config, subnet),
    )
    classes: dict[type[nn.Module], type[nn.Module]] = {
        EvaAttention: ElasticEvaAttention,
        EvaBlock: ElasticEvaBlock,
        SwiGLU: ElasticSwiGLU,
    }
    make_elastic(model, {**ELASTIC, **classes})
    blocks = model.elastic_blocks()
    for block in blocks:
        block.ls1, block.ls2 = (HeldByBlock(cast(EvaBlock, block), name) for name in ("gamma_1", "gamma_2"))
        attn = cast(ElasticEvaAttention, block.attn)
        attn.impl, block.residual = attention, residual
        attn.qkv.__class__ = ElasticQKV
    model.num_layers, model.num_draws = len(blocks) + 1, 2 * len(blocks)
    model._configure(config, subnet.width, sharded, activation_checkpointing)
    return model
