"""Elastic ResNet: timm's bottleneck ResNet with GroupNorm, mid channels and blocks per stage.

Residual channels are full in every sub-network, so only the convolutions inside a block are cut.
"""

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import GroupNorm
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.elastic.backbone import Backbone, ElasticBlock, Features
from pipeline.elastic.layers import ELASTIC, ElasticConv2d, ElasticGroupNorm, make_elastic
from pipeline.elastic.maps import mask_grid, put_mask_token, spread
from pipeline.elastic.subnet import Subnet, kept, largest_subnet

STRIDE = 32
STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM_CHANNELS = 64


class ElasticBottleneck(ElasticBlock, Bottleneck):
    """1x1, 3x3 and 1x1 convolution with a residual connection."""

    conv1: ElasticConv2d
    conv2: ElasticConv2d
    conv3: ElasticConv2d
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module
    act1: nn.Module
    act2: nn.Module
    act3: nn.Module
    downsample: nn.Module | None
    full_width: int

    def _body(self, *xs: Tensor, width: int, kept: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Per crop group `[B, C, H, W]` -> `[B, C', H', W']`; `kept` int64 indices of the images to compute."""
        return tuple(self._one(x, width, chosen) for x, chosen in zip(xs, kept, strict=True))

    def _one(self, x: Tensor, width: int, kept: Tensor | None) -> Tensor:
        mid = self.conv1.out_channels * width // self.full_width
        shortcut = x if self.downsample is None else self.downsample(x)
        y = x if kept is None else x.index_select(0, kept)
        y = self.act1(self.bn1(self.conv1(y, mid)))
        y = self.act2(self.bn2(self.conv2(y, mid)))
        y = self.bn3(self.conv3(y))
        if kept is None:
            return self.act3(shortcut + y)
        return self.act3(shortcut.index_add(0, kept, y, alpha=x.shape[0] / kept.shape[0]))


class ElasticResNet(Backbone, ResNet):
    """The largest ResNet of a grid."""

    architecture = "resnet50_gn"
    pool = "avg"
    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    maxpool: nn.Module
    global_pool: nn.Module
    num_features: int

    def elastic_blocks(self) -> Sequence[ElasticBottleneck]:
        return [cast(ElasticBottleneck, block) for stage in self._stages() for block in stage]

    def _stages(self) -> list[nn.Sequential]:
        return [cast(nn.Sequential, getattr(self, name)) for name in STAGES]

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        self._check(subnet)
        maps = [self._stem(x, mask) for x, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        done = 0
        for stage, active in zip(self._stages(), kept(self.config, subnet), strict=True):
            for i, block in enumerate(stage):
                if i in active or self.sharded:
                    rows = [k[done + i] for k in keep] if keep else [None] * len(crops)
                    maps = block(*maps, width=subnet.width, kept=rows, active=i in active)
            done += len(stage)
        return [Features(self.global_pool(x), spread(x.permute(0, 2, 3, 1))) for x in maps]

    def _stem(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, C, H, W]` -> `[B, 64, H/4, W/4]`, masked cells replaced."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        if mask is None:
            return x
        return put_mask_token(x.permute(0, 2, 3, 1), mask, self.mask_token, grid).permute(0, 3, 1, 2)

    def feature_dim(self, subnet: Subnet) -> int:
        return self.num_features

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return mask_grid(height, width, STRIDE)

    def layer_id(self, name: str) -> int:
        """As documented on Backbone; there is no final norm, so the last block is the last layer."""
        if not name.startswith("layer"):
            return 0
        stage, index, *_ = name.split(".")
        return sum(len(s) for s in self._stages()[: STAGES.index(stage)]) + int(index) + 1

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        return resnet_args(self.config, subnet)

    def source_name(self, name: str, subnet: Subnet) -> str:
        parts = name.split(".")
        if parts[0] in STAGES and parts[1:]:
            stage = STAGES.index(parts[0])
            parts[1] = str(kept(self.config, subnet)[stage][int(parts[1])])
        return ".".join(parts)


def resnet_args(config: ModelConfig, subnet: Subnet) -> dict[str, Any]:
    """timm's keyword arguments for a sub-network."""
    return {
        "in_chans": config.in_chans,
        "layers": list(subnet.depths),
        "base_width": subnet.width,
        "global_pool": "avg",
        "num_classes": 0,
    }


def build(
    config: ModelConfig, *, attention: str, residual: str, activation_checkpointing: bool, sharded: bool
) -> ElasticResNet:
    """Build an elastic ResNet; see `pipeline.elastic.build`. It has neither attention nor rows to add up."""
    subnet = largest_subnet(config)
    model = ElasticResNet(block=Bottleneck, norm_layer="groupnorm", **resnet_args(config, subnet))
    make_elastic(model, {**ELASTIC, GroupNorm: ElasticGroupNorm, Bottleneck: ElasticBottleneck})
    for block in model.elastic_blocks():
        block.full_width = subnet.width
    model.num_layers = len(model.elastic_blocks())
    model.num_draws = len(model.elastic_blocks())
    model._configure(config, STEM_CHANNELS, sharded, activation_checkpointing)
    return model
