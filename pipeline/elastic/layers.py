"""Layers that compute with the leading part of their parameters.

Each is a subclass of the layer that timm builds, with the same parameters. It sees its input width in `x`, is told
its output width, and holds no state about either. `sliced` is the one slicing rule of a layer: `forward` computes
with what it returns, and export writes the same tensors into a smaller timm model.
"""

from typing import Protocol, cast, runtime_checkable

import torch.nn.functional as F
from timm.layers import LayerNorm, LayerScale, Mlp, PatchEmbed
from torch import Tensor, nn


def leading(parameter: Tensor, size: int, *, dim: int = -1, groups: int = 1) -> Tensor:
    """The first `size / groups` entries of each of `groups` equal parts along `dim`."""
    if parameter.shape[dim] == size:
        return parameter
    if groups == 1:
        return parameter.narrow(dim, 0, size)
    parts = parameter.unflatten(dim, (groups, -1))
    dim = dim if dim >= 0 else dim + parameter.ndim
    return parts.narrow(dim + 1, 0, size // groups).flatten(dim, dim + 1)


def leading_weight(weight: Tensor, out: int, inputs: int, out_groups: int = 1, in_groups: int = 1) -> Tensor:
    """A weight `[O, I, ...]` cut to `[out, inputs, ...]` and, where inputs were cut, multiplied by I / inputs.

    The factor keeps the scale of pre-activations; on the weight it costs nothing, on the activations a pass over them.
    """
    full_inputs = weight.shape[1]
    weight = leading(weight, out, dim=0, groups=out_groups)
    if inputs == full_inputs:
        return weight
    return leading(weight, inputs, dim=1, groups=in_groups) * (full_inputs / inputs)


@runtime_checkable
class ElasticLayer(Protocol):
    """A layer whose parameters can be cut: to (out, inputs) channels of a weight, or to the channels of a vector."""

    def sliced(self, *shape: int) -> dict[str, Tensor]: ...


class ElasticLinear(nn.Linear):
    """Linear layer whose output (input) channels form `out_groups` (`in_groups`) parts that are cut alike."""

    out_groups = 1
    in_groups = 1

    def sliced(self, out: int, inputs: int) -> dict[str, Tensor]:
        weight = leading_weight(self.weight, out, inputs, self.out_groups, self.in_groups)
        if self.bias is None:
            return {"weight": weight}
        return {"weight": weight, "bias": leading(self.bias, out, groups=self.out_groups)}

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        """`[..., inputs]` -> `[..., out]`; all of the outputs if `out` is None."""
        p = self.sliced(out or self.out_features, x.shape[-1])
        return F.linear(x, p["weight"], p.get("bias"))


class ElasticQKV(ElasticLinear):
    """Projection to queries, keys and values: three parts."""

    out_groups = 3


class ElasticReduction(ElasticLinear):
    """Patch merging: its input is the channels of four neighbouring patches."""

    in_groups = 4


class ElasticConv2d(nn.Conv2d):
    """Convolution without channel groups."""

    def sliced(self, out: int, inputs: int) -> dict[str, Tensor]:
        weight = leading_weight(self.weight, out, inputs)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": leading(self.bias, out)}

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        """`[B, inputs, H, W]` -> `[B, out, H', W']`; all of the outputs if `out` is None."""
        p = self.sliced(out or self.out_channels, x.shape[1])
        padding = cast(tuple[int, int], self.padding)
        return F.conv2d(x, p["weight"], p.get("bias"), self.stride, padding, self.dilation)


class ElasticLayerNorm(nn.LayerNorm):
    """LayerNorm over the active channels."""

    groups = 1

    def sliced(self, channels: int) -> dict[str, Tensor]:
        return {name: leading(p, channels, groups=self.groups) for name, p in self.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.sliced(x.shape[-1])
        return F.layer_norm(x, (x.shape[-1],), p["weight"], p["bias"], self.eps)


class ElasticMergedNorm(ElasticLayerNorm):
    """The norm before patch merging, over the channels of four neighbouring patches."""

    groups = 4


class ElasticGroupNorm(nn.GroupNorm):
    """GroupNorm with its number of groups spread over the active channels."""

    def sliced(self, channels: int) -> dict[str, Tensor]:
        return {name: leading(p, channels) for name, p in self.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.sliced(x.shape[1])
        return F.group_norm(x, self.num_groups, p["weight"], p["bias"], self.eps)


class ElasticLayerScale(LayerScale):
    """Learned factor per channel."""

    def sliced(self, channels: int) -> dict[str, Tensor]:
        return {"gamma": leading(self.gamma, channels)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sliced(x.shape[-1])["gamma"]


class ElasticMlp(Mlp):
    """Two linear layers; hidden units stay in proportion to the input width."""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        hidden = width * self.fc1.out_features // self.fc1.in_features
        return self.fc2(self.act(self.fc1(x, hidden)), width)


class ElasticPatchEmbed(PatchEmbed):
    """Patches to tokens; the one layer of a transformer that is told the width of the sub-network."""

    def forward(self, images: Tensor, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, H/p, W/p, width]`."""
        return self.norm(self.proj(images, width).permute(0, 2, 3, 1))


ELASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ElasticLinear,
    nn.Conv2d: ElasticConv2d,
    nn.LayerNorm: ElasticLayerNorm,
    nn.GroupNorm: ElasticGroupNorm,
    LayerNorm: ElasticLayerNorm,
    LayerScale: ElasticLayerScale,
    Mlp: ElasticMlp,
    PatchEmbed: ElasticPatchEmbed,
}


def make_elastic(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Turn every submodule whose exact class is a key into the elastic subclass of the same layout, in place."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
