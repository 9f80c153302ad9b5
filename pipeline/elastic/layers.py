"""Layers that compute with the leading part of their parameters.

Each is a subclass of the layer that timm builds, with the same parameters. It sees its input width in `x`, is told
its output width, and holds no state about either. `sliced` is the one slicing rule of a layer: `forward` computes
with what it returns, and export writes the same tensors into a smaller timm model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.elastic.compiler import compiler_deferred
from pipeline.elastic.optional import left_out

with compiler_deferred(), left_out("wandb"):
    from timm.layers import LayerNorm, LayerScale, Mlp, PatchEmbed


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


class ElasticLayer(nn.Module):
    """A layer whose parameters can be cut: to (out, inputs) channels of a weight, or to the channels of a vector."""

    recut = False
    """Keep no cut parameter for the backward pass, but cut it again there: a slice would keep a gathered weight alive
    (ZeRO-3)."""

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        """The parameters cut to a shape, by name."""
        raise NotImplementedError

    def saving(self, parameters: dict[str, Tensor], *shape: int) -> AbstractContextManager[Any]:
        """Around the computation with `parameters`, which is `sliced(*shape)`."""
        # the compiler and checkpointing keep no slices, or keep them for a moment
        if not self.recut or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        names = {p.data_ptr(): name for name, p in parameters.items()}

        def pack(saved: Tensor) -> Any:
            name = names.get(saved.data_ptr())
            return saved if name is None else (name, saved.shape, saved.stride())

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            name, size, stride = kept
            again = self.sliced(*shape)[name]
            return again.as_strided(size, stride, again.storage_offset())

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def recut_in_backward(model: nn.Module) -> None:
    """Let every elastic layer of a model cut its parameters again in the backward pass; see `ElasticLayer.recut`."""
    for module in model.modules():
        if isinstance(module, ElasticLayer):
            module.recut = True


class ElasticLinear(ElasticLayer, nn.Linear):
    """Linear layer whose output (input) channels form `out_groups` (`in_groups`) parts that are cut alike."""

    out_groups = 1
    in_groups = 1

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        out, inputs = shape
        weight = leading_weight(self.weight, out, inputs, self.out_groups, self.in_groups)
        if self.bias is None:
            return {"weight": weight}
        return {"weight": weight, "bias": leading(self.bias, out, groups=self.out_groups)}

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        """`[..., inputs]` -> `[..., out]`; all of the outputs if `out` is None."""
        shape = (out or self.out_features, x.shape[-1])
        p = self.sliced(*shape)
        with self.saving(p, *shape):
            return F.linear(x, p["weight"], p.get("bias"))


class ElasticQKV(ElasticLinear):
    """Projection to queries, keys and values: three parts."""

    out_groups = 3


class ElasticReduction(ElasticLinear):
    """Patch merging: its input is the channels of four neighbouring patches."""

    in_groups = 4


class ElasticConv2d(ElasticLayer, nn.Conv2d):
    """Convolution without channel groups."""

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        out, inputs = shape
        weight = leading_weight(self.weight, out, inputs)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": leading(self.bias, out)}

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        """`[B, inputs, H, W]` -> `[B, out, H', W']`; all of the outputs if `out` is None."""
        shape = (out or self.out_channels, x.shape[1])
        p, padding = self.sliced(*shape), cast(tuple[int, int], self.padding)
        with self.saving(p, *shape):
            return F.conv2d(x, p["weight"], p.get("bias"), self.stride, padding, self.dilation)


class ElasticLayerNorm(ElasticLayer, nn.LayerNorm):
    """LayerNorm over the active channels."""

    groups = 1

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        (channels,) = shape
        return {name: leading(p, channels, groups=self.groups) for name, p in self.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.sliced(x.shape[-1])
        with self.saving(p, x.shape[-1]):
            return F.layer_norm(x, (x.shape[-1],), p["weight"], p["bias"], self.eps)


class ElasticMergedNorm(ElasticLayerNorm):
    """The norm before patch merging, over the channels of four neighbouring patches."""

    groups = 4


class ElasticGroupNorm(ElasticLayer, nn.GroupNorm):
    """GroupNorm with its number of groups spread over the active channels."""

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        (channels,) = shape
        return {name: leading(p, channels) for name, p in self.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.sliced(x.shape[1])
        with self.saving(p, x.shape[1]):
            return F.group_norm(x, self.num_groups, p["weight"], p["bias"], self.eps)


class ElasticLayerScale(ElasticLayer, LayerScale):
    """Learned factor per channel."""

    def sliced(self, *shape: int) -> dict[str, Tensor]:
        (channels,) = shape
        return {"gamma": leading(cast(Tensor, self.gamma), channels)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.sliced(x.shape[-1])
        with self.saving(p, x.shape[-1]):
            return x * p["gamma"]


class ElasticMlp(Mlp):
    """Two linear layers; hidden units are in proportion to the input width."""

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """`[..., C]` -> `[..., C]` by way of the first `ratio` C hidden units."""
        width = x.shape[-1]
        return self.fc2(self.act(self.fc1(x, ratio * width)), width)


class ElasticPatchEmbed(PatchEmbed):
    """Patches to tokens; the one layer of a transformer that is told the width of the sub-network."""

    proj: ElasticConv2d

    def forward(self, images: Tensor, width: int) -> Tensor:
        """`[B, C, H, W]` -> `[B, H/p, W/p, width]`."""
        return self.norm(self.product(images, width) if images.is_cuda else self.convolution(images, width))

    def convolution(self, images: Tensor, width: int) -> Tensor:
        """As timm computes it."""
        return self.proj(images, width).permute(0, 2, 3, 1)

    def product(self, images: Tensor, width: int) -> Tensor:
        """The same by one matrix product, for which a GPU wants a fifth of the time of cuDNN's convolution."""
        batch, channels, *sides = images.shape
        (p, q), (height, breadth) = self.patch_size, (n // k for n, k in zip(sides, self.patch_size, strict=True))
        patches = images.reshape(batch, channels, height, p, breadth, q).permute(0, 2, 4, 1, 3, 5).flatten(3)
        shape = width, channels
        cut = self.proj.sliced(*shape)
        with self.proj.saving(cut, *shape):
            return F.linear(patches, cut["weight"].flatten(1), cut.get("bias"))


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
