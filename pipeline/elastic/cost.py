"""Parameters and FLOPs of sub-networks and training steps, in closed form from the shapes.

Counted are matrix products and convolutions, a multiply-accumulate as 2 FLOPs; norms, activations and additions are
not. Importing this module imports no torch.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from pipeline.config import ExperimentConfig, HeadsConfig, ModelConfig
from pipeline.elastic.subnet import Subnet, largest_subnet, mlp_ratio

RESNET_PLANES = (64, 128, 256, 512)
RESNET_EXPANSION = 4


class Work(NamedTuple):
    """FLOPs of a forward pass over one image.

    Attributes:
        stem: the layer that reads the image, and so needs no gradient of its input.
        trunk: layers between blocks.
        branches: residual branches, which stochastic depth leaves out for some images.
    """

    stem: float
    trunk: float
    branches: float

    def training(self, kept: float) -> float:
        """Forward and backward pass, with a fraction `kept` of the images in every branch."""
        return 2 * self.stem + 3 * (self.trunk + kept * self.branches)


class StepFlops(NamedTuple):
    """FLOPs of one training step on one rank."""

    teacher: float
    intact: float
    elastic: float

    @property
    def total(self) -> float:
        return self.teacher + self.intact + self.elastic


def params(config: ModelConfig, subnet: Subnet) -> int:
    """Parameters of the extracted model."""
    return _PARAMS[config.family](config, subnet)


def largest_block_params(config: ModelConfig) -> int:
    """Parameters of the largest block of the largest network."""
    full = largest_subnet(config)
    fewer = [
        Subnet(full.width, (*full.depths[:i], depth - 1, *full.depths[i + 1 :])) for i, depth in enumerate(full.depths)
    ]
    return max(params(config, full) - params(config, subnet) for subnet in fewer)


def flops(config: ModelConfig, subnet: Subnet, image_size: int | None = None) -> float:
    """FLOPs of a forward pass over one square image, of the training size if `image_size` is None."""
    return sum(_WORK[config.family](config, subnet, image_size or config.image_size))


def feature_dim(config: ModelConfig, subnet: Subnet) -> int:
    """Channels of the features."""
    if config.one_stage:
        return subnet.width
    return 8 * subnet.width if config.family == "swin" else RESNET_PLANES[-1] * RESNET_EXPANSION


def head_params(config: HeadsConfig, in_dim: int) -> int:
    """Parameters of the projection heads."""
    widths = [in_dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim]
    mlp = sum((a + 1) * b for a, b in pairwise(widths))
    of_prototype = config.bottleneck_dim + (config.prototype_gain == "learned")
    return sum(mlp + count * of_prototype for count in config.prototypes)


class TrainedParams(NamedTuple):
    """Parameters that a run trains."""

    backbone: int
    heads: int

    @property
    def total(self) -> int:
        return self.backbone + self.heads


def trained_params(config: ExperimentConfig) -> TrainedParams:
    """Parameters of the largest network and of its projection heads."""
    largest = largest_subnet(config.model)
    dim = feature_dim(config.model, largest)
    return TrainedParams(params(config.model, largest), head_params(config.heads, dim))


def head_flops(config: HeadsConfig, in_dim: int) -> float:
    """FLOPs of the projection heads for one token in the forward pass."""
    widths = [in_dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim]
    mlp = sum(a * b for a, b in pairwise(widths))
    return 2.0 * sum(mlp + count * config.bottleneck_dim for count in config.prototypes)


def masked_patches(config: ExperimentConfig) -> float:
    """Expected masked patches of a global crop once iBOT is active."""
    low, high = config.loss.mask_ratio
    return config.loss.mask_probability * (low + high) / 2 * _patch_tokens(config.model)


def step_flops(config: ExperimentConfig, subnet: Subnet | None, masked: float | None = None) -> StepFlops:
    """FLOPs of one step on one rank: both crop kinds, heads included.

    The backward pass costs twice the forward pass, less the gradient of the images. Stochastic depth saves the branches
    of dropped images.

    Args:
        config: the experiment.
        subnet: the elastic student, if there is one.
        masked: patches per global crop that take part in iBOT; `masked_patches(config)` if None.
    """
    images, model = config.data.batch_size, config.model
    global_rows = 2 * images * (1 + (masked_patches(config) if masked is None else masked))
    rows = global_rows + images * config.data.local_crops.count
    largest = largest_subnet(model)
    work = _WORK[model.family]

    def student(net: Subnet) -> float:
        kept = 1 - model.drop_path
        glob = work(model, net, config.data.global_crops.size).training(kept)
        local = work(model, net, config.data.local_crops.size).training(kept) if config.data.local_crops.count else 0.0
        heads = 3 * rows * head_flops(config.heads, feature_dim(model, net))
        return images * (2 * glob + config.data.local_crops.count * local) + heads

    teacher = 2 * images * sum(work(model, largest, config.data.global_crops.size))
    if config.loss.anchor_weight:
        teacher *= 2  # the frozen network that features are held to sees what the teacher sees, without heads
    teacher += global_rows * head_flops(config.heads, feature_dim(model, largest))
    return StepFlops(teacher, student(largest), student(subnet) if subnet else 0.0)


def _patch_tokens(config: ModelConfig) -> int:
    """Cells of the mask of a global crop."""
    last_side = config.image_size // config.stride
    return last_side**2 if config.one_stage else (2 * last_side) ** 2


def _vit_params(config: ModelConfig, subnet: Subnet) -> int:
    # positions have one for the class token, unless there are registers
    w, r, tokens = subnet.width, mlp_ratio(config, subnet), _patch_tokens(config) + (config.registers or 1)
    scale = 2 * w if config.layer_scale else 0
    block = (4 + 2 * r) * w * w + (3 + 1 + r + 1) * w + 4 * w + scale
    return (config.patch_size**2 * config.in_chans + 1) * w + (tokens + 1) * w + subnet.depths[0] * block + 2 * w


def _vit_work(config: ModelConfig, subnet: Subnet, image_size: int) -> Work:
    w, patches = subnet.width, (image_size // config.patch_size) ** 2
    tokens, r = patches + 1 + config.registers, mlp_ratio(config, subnet)
    block = 2.0 * tokens * (4 + (3 if config.swiglu else 2) * r) * w * w + 4.0 * tokens * tokens * w
    return Work(2.0 * patches * config.patch_size**2 * config.in_chans * w, 0.0, subnet.depths[0] * block)


def _eva_params(config: ModelConfig, subnet: Subnet) -> int:
    """Attention without biases but of its projection, MLP or SwiGLU; no table of positions."""
    w, r = subnet.width, mlp_ratio(config, subnet)
    mlp = 3 * r * w * w + (2 * r + 1) * w if config.swiglu else 2 * r * w * w + (r + 1) * w
    block = 4 * w * w + w + 4 * w + mlp + 2 * w
    in_front = (1 + config.registers) * w
    return (config.patch_size**2 * config.in_chans + 1) * w + in_front + subnet.depths[0] * block + 2 * w


def _swin_params(config: ModelConfig, subnet: Subnet) -> int:
    r = mlp_ratio(config, subnet)
    total = (config.patch_size**2 * config.in_chans + 1) * subnet.width + 2 * subnet.width
    for stage, depth in enumerate(subnet.depths):
        c = subnet.width << stage
        window = min(config.window_size, (config.image_size // config.patch_size) >> stage)
        table = (2 * window - 1) ** 2 * (c // config.head_dim)
        total += depth * ((4 + 2 * r) * c * c + (3 + 1 + r + 1) * c + 4 * c + table)
        if stage:
            total += 2 * c * c + 4 * c  # merging 2c -> c after a norm over 2c channels
    return total + 2 * (subnet.width << 3)


def _swin_work(config: ModelConfig, subnet: Subnet, image_size: int) -> Work:
    side, r = image_size // config.patch_size, mlp_ratio(config, subnet)
    stem = 2.0 * side * side * config.patch_size**2 * config.in_chans * subnet.width
    trunk = branches = 0.0
    for stage, depth in enumerate(subnet.depths):
        c = subnet.width << stage
        if stage:
            side //= 2
            trunk += 2.0 * side * side * 2 * c * c
        window = min(config.window_size, side)
        padded = (-(-side // window) * window) ** 2
        mlp = 2.0 * side * side * 2 * r * c * c
        branches += depth * (2.0 * padded * 4 * c * c + 4.0 * padded * window**2 * c + mlp)
    return Work(stem, trunk, branches)


def _resnet_params(config: ModelConfig, subnet: Subnet) -> int:
    total, inputs = 49 * config.in_chans * 64 + 2 * 64, 64
    for planes, depth in zip(RESNET_PLANES, subnet.depths, strict=True):
        mid, out = planes * subnet.width // 64, planes * RESNET_EXPANSION
        total += inputs * out + 2 * out  # projection of the shortcut
        for _ in range(depth):
            total += inputs * mid + 9 * mid * mid + mid * out + 4 * mid + 2 * out
            inputs = out
    return total


def _resnet_work(config: ModelConfig, subnet: Subnet, image_size: int) -> Work:
    side, inputs = image_size // 4, 64
    stem = 2.0 * (image_size // 2) ** 2 * 49 * config.in_chans * 64
    trunk = branches = 0.0
    for stage, (planes, depth) in enumerate(zip(RESNET_PLANES, subnet.depths, strict=True)):
        mid, out, before = planes * subnet.width // 64, planes * RESNET_EXPANSION, side
        side = side // 2 if stage else side
        trunk += 2.0 * side * side * inputs * out
        for _ in range(depth):
            branches += 2.0 * before * before * inputs * mid + 2.0 * side * side * (9 * mid * mid + mid * out)
            inputs, before = out, side
    return Work(stem, trunk, branches)


_PARAMS: dict[str, Callable[[ModelConfig, Subnet], int]] = {
    "vit": _vit_params,
    "eva": _eva_params,
    "swin": _swin_params,
    "resnet": _resnet_params,
}
_WORK: dict[str, Callable[[ModelConfig, Subnet, int], Work]] = {
    "vit": _vit_work,
    "eva": _vit_work,
    "swin": _swin_work,
    "resnet": _resnet_work,
}
