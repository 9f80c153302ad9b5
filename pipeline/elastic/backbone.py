"""What every elastic backbone offers, whatever its family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.elastic.layers import ElasticLayer, leading, recut_in_backward
from pipeline.elastic.subnet import Grid, Subnet
from pipeline.elastic.uninitialised import Uninitialised


class Features(NamedTuple):
    """Output of a backbone: cls `[B, D]` and patches `[B, N, D]`, both after the final norm."""

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Export:
    """A sub-network as a plain timm model: `timm.create_model(architecture, **model_args)` with `state_dict`.

    Attributes:
        architecture: name in timm's registry.
        model_args: keyword arguments, JSON values only.
        state_dict: all weights, contiguous, on the CPU, under timm's names.
        feature_dim: channels of the pooled features.
        pool: "token" or "avg".
    """

    architecture: str
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    feature_dim: int
    pool: str


class ElasticBlock(nn.Module):
    """A residual block of a backbone: `_body` computes it, `forward` decides how.

    `torch.compile` and checkpointing wrap `_body` and not the module, whose hooks (ZeRO-3) they would hide.
    """

    checkpointed = False
    compiled: str | None = None  # backend of torch.compile
    residual = "eager"  # implementation of the sum of a branch's rows

    _body: Callable[..., tuple[Tensor, ...]]  # (self, *xs, **options), per family

    def forward(self, *xs: Tensor, active: bool = True, **options: Any) -> tuple[Tensor, ...]:
        """The block, or a copy of its inputs where the sub-network leaves it out.

        Args:
            xs: one tensor, or one per crop group: a block is called once per pass, since ZeRO-3 reduces its gradients
                when the call's backward pass ends.
            active: whether the sub-network has this block.
            options: of `_body`.

        Returns:
            As many tensors as `xs`.
        """
        if not active:
            # new tensors, so that the hooks of this module bracket them in the backward pass
            return tuple(x.clone() for x in xs)
        body: Callable[..., tuple[Tensor, ...]] = type(self)._body
        if self.compiled:
            body = _compiled_body(cast(Any, type(self)), self.compiled)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(body, self, *xs, use_reentrant=False, **options)
        return body(self, *xs, **options)


@cache
def _compiled_body(block: Any, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(block._body, dynamic=False, fullgraph=True, backend=backend)


class Backbone(nn.Module):
    """The largest network of a family and, in its leading channels and chosen blocks, all the others.

    Subclasses also derive from the timm class, whose parameter names they keep; `mask_token` is the only parameter
    that timm does not know. `feature_grid` etc. are documented here once, implemented per family.
    """

    config: ModelConfig
    grid: Grid
    architecture: str
    pool: str
    num_layers: int
    num_draws: int
    sharded: bool
    mask_token: nn.Parameter

    def _configure(self, config: ModelConfig, mask_width: int, sharded: bool, checkpointed: bool) -> None:
        self.config = config
        self.grid = Grid(config)
        self.sharded = sharded
        self.mask_token = nn.Parameter(torch.zeros(1, mask_width))
        for block in self.elastic_blocks():
            block.checkpointed = checkpointed
        if sharded:
            recut_in_backward(self)

    # -- per family -------------------------------------------------------------------------------------------------

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        subnet: Subnet,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Features of several crop groups in one pass.

        Args:
            crops: images `[B_g, C, H_g, W_g]` per group, in the dtype of the weights.
            subnet: a member of `grid`.
            masks: per group, None or bool `[B_g, N_g]`, true where a patch is replaced by the mask token.
            keep: per group, int64 `[num_draws, kept_g]` from `keep_indices`; None computes every image.

        Returns:
            Features per group.

        Raises:
            ValueError: `subnet` is not in the grid, or an image side does not fit the patches.
        """
        raise NotImplementedError

    def feature_dim(self, subnet: Subnet) -> int:
        """Channels D of the features."""
        raise NotImplementedError

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of `Features.patches` and of the masks."""
        raise NotImplementedError

    def layer_id(self, name: str) -> int:
        """Depth of a parameter: 0 embedding and tokens, 1.. blocks, `num_layers` final norm, or last block if none."""
        raise NotImplementedError

    def elastic_blocks(self) -> Sequence[ElasticBlock]:
        """Blocks of the largest network in order."""
        raise NotImplementedError

    def model_args(self, subnet: Subnet) -> dict[str, Any]:
        """Keyword arguments with which timm builds `subnet` alone."""
        raise NotImplementedError

    def source_name(self, name: str, subnet: Subnet) -> str:
        """The module of this backbone that becomes module `name` of the extracted model."""
        raise NotImplementedError

    # -- shared -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        subnet: Subnet | None = None,
        masks: Any = None,
        keep: Sequence[Tensor] | None = None,
    ) -> Features | list[Features]:
        """Features of `images` `[B, C, H, W]` by `subnet` (the full network if None); masks bool `[B, N]`.

        With a sequence of crop groups, `forward_crops` by way of the module's hooks, which ZeRO-3 needs.
        """
        subnet = subnet or self.grid.largest
        if isinstance(images, Tensor):
            return self.forward_crops([images], subnet, [masks])[0]
        return self.forward_crops(images, subnet, masks, keep)

    def is_patch_embed(self, name: str) -> bool:
        """Whether a parameter belongs to the patch embedding, whose learning rate has a factor of its own."""
        return name.startswith("patch_embed.")

    def no_weight_decay(self, name: str) -> bool:
        """Whether a parameter is not decayed: biases, norms and LayerScale.

        cls, mask and position tokens are decayed, as DINOv2 does; a table of relative-position biases is a bias.
        """
        return self.get_parameter(name).ndim <= 1 or name.endswith("relative_position_bias_table")

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the body of every block with `torch.compile`, once per shape; never fall back to eager in silence.

        Widths and MLP ratios are shapes, so the default limit of recompilations is far below what a grid needs.
        """
        limit = 16 * (len(self.grid.widths) + 2) * len(self.grid.depths[0]) * len(self.grid.mlp_ratios)
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, limit)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * limit)
        config.fail_on_recompile_limit_hit = True
        for block in self.elastic_blocks():
            block.compiled = backend

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the largest network as timm names it: without the mask token."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != "mask_token"}

    def load_timm_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of the largest timm model; the mask token is left as it is.

        Raises:
            ValueError: a key is missing, unknown or of another shape.
        """
        own = self.timm_state_dict()
        problems = [f"{name} is missing" for name in own if name not in state_dict]
        problems += [f"{name} is unknown" for name in state_dict if name not in own]
        for name in own.keys() & state_dict.keys():
            if own[name].shape != state_dict[name].shape:
                problems.append(f"{name} is {list(state_dict[name].shape)}, not {list(own[name].shape)}")
        if problems:
            raise ValueError("; ".join(sorted(problems)[:5]) + (f"; {len(problems)} in all" if problems[5:] else ""))
        self.load_state_dict(dict(state_dict), strict=False)

    @torch.no_grad()
    def export(self, subnet: Subnet) -> Export:
        """Cut `subnet` out as a plain timm model: the slices that `forward` computes with, factors folded in.

        Raises:
            ValueError: `subnet` is not in the grid.
        """
        import timm

        self._check(subnet)
        args = self.model_args(subnet)
        with torch.device("meta"), Uninitialised():
            skeleton = timm.create_model(self.architecture, **args)
        state = {}
        for name, module in skeleton.named_modules():
            shapes = {key: p.shape for key, p in module.named_parameters(recurse=False)}
            if shapes:
                source = self.get_submodule(self.source_name(name, subnet))
                prefix = f"{name}." if name else ""
                state.update({prefix + key: p for key, p in _cut(source, shapes).items()})
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        return Export(self.architecture, args, state, self.feature_dim(subnet), self.pool)

    def _check(self, subnet: Subnet) -> None:
        if subnet not in self.grid:
            raise ValueError(f"sub-network {subnet} is not in the grid {self.grid.smallest} .. {self.grid.largest}")


def _cut(source: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The parameters of `source` that a module with parameters of these shapes takes over."""
    if isinstance(source, ElasticLayer):
        return source.sliced(*next(iter(shapes.values()))[:2])
    own = dict(source.named_parameters(recurse=False))
    return {name: leading(own[name], shape[-1]) for name, shape in shapes.items()}
