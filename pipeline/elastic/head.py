"""Projection heads: an MLP on the unit sphere, compared with prototypes."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.elastic.layers import ElasticLinear

if TYPE_CHECKING:
    from pipeline.config import HeadsConfig


class ProjectionHead(nn.Module):
    """MLP, l2 normalisation, cosine to each prototype.

    Args:
        in_dim: channels of the largest sub-network's features.
        prototypes: number of prototypes K.
        config: sizes of the MLP.
    """

    def __init__(self, in_dim: int, prototypes: int, config: "HeadsConfig"):
        super().__init__()
        widths = [config.hidden_dim] * (config.layers - 1) + [config.bottleneck_dim]
        linears = [ElasticLinear(in_dim, widths[0]), *(nn.Linear(*sizes) for sizes in pairwise(widths))]
        self.mlp = nn.Sequential(*[layer for linear in linears for layer in (linear, nn.GELU())][:-1])
        self.prototypes = nn.Parameter(torch.empty(prototypes, config.bottleneck_dim))
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.prototypes, std=config.bottleneck_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[R, D]`, D at most `in_dim` -> cosines `[R, K]`."""
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        # normalised here and not by a parametrisation, which would rename the parameter and escape ZeRO-3
        return F.linear(F.normalize(self.mlp(x), dim=-1, eps=eps), F.normalize(self.prototypes, dim=-1, eps=eps))


class ProjectionHeads(nn.Module):
    """The heads of a run, shared by cls and patch tokens.

    Args:
        in_dim: channels of the largest sub-network's features.
        config: sizes; one head per entry of `prototypes`.
    """

    def __init__(self, in_dim: int, config: "HeadsConfig"):
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead(in_dim, count, config) for count in config.prototypes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features `[R, D]` -> per head, cosines `[R, K_h]`."""
        return [head(x) for head in self.heads]
