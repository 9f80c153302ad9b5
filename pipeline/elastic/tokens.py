"""What the families with one sequence of tokens share: class token and registers in front, blocks over packed rows."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.elastic.backbone import Backbone, ElasticBlock, Features
from pipeline.elastic.layers import ElasticPatchEmbed, leading
from pipeline.elastic.stochastic_depth import kept_rows
from pipeline.elastic.subnet import Subnet, kept, mlp_ratio


class TokenBackbone(Backbone):
    """A transformer over the tokens of a class, of registers and of patches, in this order."""

    pool = "token"
    blocks: nn.Module
    patch_embed: ElasticPatchEmbed
    cls_token: nn.Parameter
    reg_token: nn.Parameter | None
    norm: nn.Module

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, 1 + registers + N, width]`."""
        raise NotImplementedError

    def _positions(self, grids: Sequence[tuple[int, int]], device: torch.device) -> dict[str, Any]:
        """What blocks are told of the positions of patches, by option; grids of patches per crop group."""
        return {}

    def elastic_blocks(self) -> Sequence[ElasticBlock]:
        return [cast(ElasticBlock, block) for block in cast(nn.Sequential, self.blocks)]

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
        positions = self._positions([self.patch_grid((x.shape[2], x.shape[3])) for x in crops], crops[0].device)
        x = torch.cat([group.flatten(0, 1) for group in groups])
        rows, blocks = kept_rows(keep, layout), self.elastic_blocks()
        (active,), ratio = kept(self.config, subnet), mlp_ratio(self.config, subnet)
        for i, block in enumerate(blocks):
            if i in active or self.sharded:
                pair = (rows[2 * i], rows[2 * i + 1]) if rows else (None, None)
                (x,) = block(x, layout=layout, kept=pair, ratio=ratio, active=i in active, **positions)
        tokens = self.norm(x).split([batch * count for batch, count in layout])
        views = [group.view(*sides, -1) for group, sides in zip(tokens, layout, strict=True)]
        return [Features(view[:, 0], view[:, 1 + self.config.registers :]) for view in views]

    def _patches(self, images: Tensor, mask: Tensor | None, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, N, width]`, masked patches replaced."""
        self.patch_grid((images.shape[2], images.shape[3]))
        x = self.patch_embed(images, width).flatten(1, 2)
        if mask is None:
            return x
        return torch.where(mask[..., None], leading(self.mask_token, width).to(x.dtype), x)

    def _in_front(self, x: Tensor) -> Tensor:
        """Tokens of patches behind those of class and registers."""
        width = x.shape[-1]
        first = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        return torch.cat([*(leading(token, width).expand(len(x), -1, -1) for token in first), x], dim=1)

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

    def source_name(self, name: str, subnet: Subnet) -> str:
        if not name.startswith("blocks."):
            return name
        _, index, *rest = name.split(".")
        return ".".join(["blocks", str(kept(self.config, subnet)[0][int(index)]), *rest])


def token_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network that all these families have."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": subnet.width,
        "depth": subnet.depths[0],
        "num_heads": subnet.width // config.head_dim,
        "mlp_ratio": mlp_ratio(config, subnet),
        "init_values": config.layer_scale,
        "global_pool": "token",
        "num_classes": 0,
    }
