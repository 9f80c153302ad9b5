"""Projection heads: an MLP on the unit sphere, compared with prototypes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.elastic.layers import ElasticLinear

if TYPE_CHECKING:
    from pipeline.config import HeadsConfig


class _Logits(torch.autograd.Function):
    """Parts of rows `[R, D]` times prototypes `[K, D]` of length 1, or of that of their gain `[K, 1]`.

    The prototypes' gradient is added up within the products, and takes its way through the division by their lengths
    where it lies; autograd would write a `[K, D]` per part and add them, and then a dozen more. With few rows these
    matrices are what costs, and to join the parts' gradients `[R_p, K]` for one product is cheaper.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, prototypes: Tensor, gain: Tensor | None, eps: float, sizes: list[int]
    ) -> tuple[Tensor, ...]:
        lengths = torch.linalg.vector_norm(prototypes, dim=-1, keepdim=True).clamp_min_(eps)
        units = prototypes / lengths
        matrix = units if gain is None else units * gain
        ctx.save_for_backward(rows, units, lengths, gain, matrix)
        ctx.sizes = sizes
        return tuple(F.linear(part, matrix) for part in rows.split(sizes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, units, lengths, gain, matrix = ctx.saved_tensors
        parts = rows.split(ctx.sizes)
        if len(rows) <= 2 * rows.shape[1]:
            parts, gradients = (rows,), (torch.cat(gradients),)
        total = torch.mm(gradients[0].mT, parts[0])
        for gradient, part in zip(gradients[1:], parts[1:], strict=True):
            if len(part):
                torch.addmm(total, gradient.mT, part, out=total)
        to_rows = torch.cat([gradient @ matrix for gradient in gradients])
        along = (total * units).sum(1, keepdim=True)
        total.addcmul_(units, along, value=-1).div_(lengths)
        if gain is None:
            return to_rows, total, None, None, None
        return to_rows, total.mul_(gain), along, None, None


class ProjectionHead(nn.Module):
    """MLP, l2 normalisation, cosine to each prototype, times the prototype's gain if that is learned.

    Args:
        in_dim: channels of the largest sub-network's features.
        prototypes: number of prototypes K.
        config: sizes of the MLP.
    """

    def __init__(self, in_dim: int, prototypes: int, config: "HeadsConfig"):
        super().__init__()
        widths = [config.hidden_dim] * (config.layers - 1) + [config.bottleneck_dim]
        linears = [ElasticLinear(*sizes) for sizes in pairwise([in_dim, *widths])]
        self.mlp = nn.Sequential(*[layer for linear in linears for layer in (linear, nn.GELU())][:-1])
        self.prototypes = nn.Parameter(torch.empty(prototypes, config.bottleneck_dim))
        learned = config.prototype_gain == "learned"
        self.prototypes_gain = nn.Parameter(torch.ones(prototypes, 1)) if learned else None
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.prototypes, std=config.bottleneck_dim**-0.5)

    def forward(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Features `[R, D]`, D at most `in_dim` -> logits `[size, K]` for consecutive parts of the rows.

        Each part is a product of its own: its loss may overwrite it, and what outlives the others keeps none of them
        in memory. Logits that need no gradient are fp16 where the weights are bf16, which is 8 times closer at the same
        size. The gain is taken on the prototypes, which are fewer than the logits, and rounded with them.
        """
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        # normalised here and not by a parametrisation, which would rename the parameter and escape ZeRO-3
        projections = F.normalize(self.mlp(x), dim=-1, eps=eps)
        if torch.is_grad_enabled():
            return _Logits.apply(projections, self.prototypes, self.prototypes_gain, eps, list(sizes))
        prototypes = F.normalize(self.prototypes, dim=-1, eps=eps)
        if x.dtype == torch.bfloat16:
            projections, prototypes = projections.half(), prototypes.half()
        if self.prototypes_gain is not None:
            prototypes = prototypes * self.prototypes_gain.to(prototypes.dtype)
        return tuple(F.linear(part, prototypes) for part in projections.split(list(sizes)))


class ProjectionHeads(nn.Module):
    """The heads of a run, shared by cls and patch tokens.

    Args:
        in_dim: channels of the largest sub-network's features.
        config: sizes; one head per entry of `prototypes`.
    """

    def __init__(self, in_dim: int, config: "HeadsConfig"):
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead(in_dim, count, config) for count in config.prototypes)

    def forward(self, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        """Features `[R_p, D]` per part -> per part and head, logits `[R_p, K_h]`."""
        x, sizes = torch.cat(list(parts)), [len(part) for part in parts]
        per_head = [head(x, sizes) for head in self.heads]
        return [list(heads) for heads in zip(*per_head, strict=True)]
