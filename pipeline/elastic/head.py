"""Projection heads: an MLP on the unit sphere, compared with prototypes."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.elastic.layers import ElasticLinear

if TYPE_CHECKING:
    from pipeline.config import HeadsConfig


_CACHED = 1 << 18
"""Elements of prototypes that a CPU takes at a time: so few that they stay in its cache meanwhile."""


def _products(
    rows: Tensor, prototypes: Tensor, gain: Tensor | None, eps: float, sizes: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Parts of rows `[R, D]` times prototypes `[K, D]`, divided by their lengths and times their gain `[K, 1]`.

    Returns:
        Logits per part, the lengths `[K, 1]`, and what the rows were multiplied by if not the prototypes themselves.
        With few rows the logits are fewer than the prototypes and take the factor, in a dtype that does not mind one
        rounding more.
    """
    parts = rows.split(list(sizes))
    logits = tuple(rows.new_empty(len(part), len(prototypes)) for part in parts)
    lengths = prototypes.new_empty(len(prototypes), 1)
    scaled = _few(rows) and rows.dtype.itemsize >= 4
    matrix = None if scaled else torch.empty_like(prototypes)
    for some in _chunks(prototypes):
        own, length = prototypes[some], lengths[some]
        torch.linalg.vector_norm(own, dim=-1, keepdim=True, out=length).clamp_min_(eps)
        if matrix is not None:
            own = torch.div(own, length, out=matrix[some])
            if gain is not None:
                own.mul_(gain[some])
        for part, found in zip(parts, logits, strict=True):
            torch.mm(part, own.mT, out=found[:, some])
            if scaled:
                found[:, some].mul_((length.reciprocal() if gain is None else gain[some] / length).mT)
    return logits, lengths, matrix


def _few(rows: Tensor) -> bool:
    """Whether matrices of prototypes are what costs."""
    return len(rows) <= 2 * rows.shape[1]


class _Logits(torch.autograd.Function):
    """`_products` per part.

    The prototypes' gradient is added up within the products, and takes its way through the division by their lengths
    where it lies, on a CPU while it is in the cache; autograd would write a `[K, D]` per part and add them, and then a
    dozen more. With few rows to join the parts' gradients `[R_p, K]` for one product is cheaper.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, prototypes: Tensor, gain: Tensor | None, eps: float, sizes: list[int]
    ) -> tuple[Tensor, ...]:
        parts, lengths, matrix = _products(rows, prototypes, gain, eps, sizes)
        ctx.save_for_backward(rows, prototypes, lengths, gain, matrix)
        ctx.sizes = sizes
        return parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, prototypes, lengths, gain, matrix = ctx.saved_tensors
        parts = rows.split(ctx.sizes)
        if _few(rows):
            parts, gradients = (rows,), (torch.cat(gradients),)
        if matrix is None:
            gradients[0].div_(lengths.mT)
        total, along = torch.empty_like(prototypes), torch.empty_like(lengths)
        for some in _chunks(prototypes):
            found, own = total[some], prototypes[some]
            torch.mm(gradients[0][:, some].mT, parts[0], out=found)
            for gradient, part in zip(gradients[1:], parts[1:], strict=True):
                if len(part):
                    torch.addmm(found, gradient[:, some].mT, part, out=found)
            if matrix is not None:
                found.div_(lengths[some])
            torch.sum(found * own, 1, keepdim=True, out=along[some])
            found.addcmul_(own, along[some] / lengths[some].square(), value=-1)
            if gain is not None:
                found.mul_(gain[some])
        if matrix is not None:
            to_rows = torch.cat([gradient @ matrix for gradient in gradients])
        else:
            to_rows = (gradients[0] if gain is None else gradients[0].mul_(gain.mT)) @ prototypes
        return to_rows, total, None if gain is None else along, None, None


def _chunks(prototypes: Tensor) -> Iterator[slice]:
    """On a CPU by `_CACHED` elements, elsewhere all at once."""
    count, length = prototypes.shape
    size = max(_CACHED // length, 1) if prototypes.device.type == "cpu" else max(count, 1)
    return (slice(start, start + size) for start in range(0, count, size))


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
        if x.dtype != torch.bfloat16:
            return _products(projections, self.prototypes, self.prototypes_gain, eps, sizes)[0]
        prototypes = F.normalize(self.prototypes, dim=-1, eps=eps).half()
        if self.prototypes_gain is not None:
            prototypes = prototypes * self.prototypes_gain.half()
        return tuple(F.linear(part, prototypes) for part in projections.half().split(list(sizes)))


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
