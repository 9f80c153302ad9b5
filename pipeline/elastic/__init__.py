"""Elastic backbones: the largest timm model of a family, with every sub-network inside it, and what each costs.

A sub-network is a value, passed to `forward`; no module remembers one. Nothing here knows losses, ranks or data.
Importing this package, `subnet`, `sampling` and `cost` does not import torch.
"""

from typing import TYPE_CHECKING, Any

from pipeline.elastic.subnet import Grid, Subnet

if TYPE_CHECKING:
    from pipeline.config import ModelConfig
    from pipeline.elastic.backbone import Backbone, Export, Features

__all__ = ["Backbone", "Export", "Features", "Grid", "Subnet", "build"]


def build(
    config: "ModelConfig",
    *,
    attention: str = "eager",
    residual: str = "eager",
    activation_checkpointing: bool = False,
    sharded: bool = False,
) -> "Backbone":
    """Build the largest network of a family, randomly initialised by timm's own scheme.

    Args:
        config: family, sizes and grid. `init_from` is not read here: see `pipeline.elastic.pretrained`.
        attention: its implementation, "eager" (or "sdpa", the same) or "triton".
        residual: implementation of what adds up rows under stochastic depth, "eager" or "triton".
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        sharded: for weights that are gathered while they are used (ZeRO-3): call also the blocks that a sub-network
            leaves out, since all ranks gather together, and keep no slice of a weight for the backward pass.
    """
    from importlib import import_module

    module = import_module(f"pipeline.elastic.{config.family}")
    return module.build(
        config,
        attention=attention,
        residual=residual,
        activation_checkpointing=activation_checkpointing,
        sharded=sharded,
    )


def __getattr__(name: str) -> Any:
    if name in ("Backbone", "Export", "Features"):
        from pipeline.elastic import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
