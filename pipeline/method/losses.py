"""The objective in terms of `kernels`: DINO on cls tokens, iBOT on masked patches, KoLeo on features.

Letters: B images, L local crops per image, H heads with K prototypes each, M masked patches. Crops are image-major:
global crop g of image b is row 2b + g, local crop j is row bL + j. Per-head values come as lists over the heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.distillation import Targets, column_sum, cross_entropy, row_logsumexp
from kernels.sinkhorn import sinkhorn

PerHead = list[Tensor]


class Logits(NamedTuple):
    """Cosines between projections and prototypes, times the prototypes' gains, one tensor per head.

    Attributes:
        local: `[BL, K]`, empty without local crops (always for the teacher).
        cls: `[2B, K]` of the global crops.
        patch: `[M, K]` of the masked patches.
    """

    local: PerHead
    cls: PerHead
    patch: PerHead


class TeacherTargets(NamedTuple):
    """Factored teacher distributions of cls tokens and masked patches, one per head."""

    cls: list[Targets]
    patch: list[Targets]


@dataclass(frozen=True)
class Pairing:
    """Which target rows each student row meets; int64 index tensors on the device of the logits.

    Attributes:
        local: `[BL, 2]` both global crops of the same image.
        swapped: `[2B, 1]` the other global crop of the same image.
        local_same, global_same: `[BL, 1]`, `[2B, 1]` the same view (intact -> elastic).
    """

    local: Tensor
    swapped: Tensor
    local_same: Tensor
    global_same: Tensor

    @classmethod
    def of(cls, images: int, local_crops: int, device: torch.device) -> "Pairing":
        views = torch.arange(2 * images, device=device)
        image = torch.arange(images, device=device).repeat_interleave(local_crops)
        return cls(
            local=torch.stack([2 * image, 2 * image + 1], 1),
            swapped=(views ^ 1)[:, None],
            local_same=torch.arange(images * local_crops, device=device)[:, None],
            global_same=views[:, None],
        )


class Centering:
    """Turns teacher logits into targets, by Sinkhorn-Knopp or by subtracting a running center.

    The centers are the only state: `center` holds, for cls and patch tokens, one fp32 `[K]` per head.

    Args:
        method: "sinkhorn" | "softmax" | "none" (plain softmax, which collapses; for tests of the alarms).
        prototypes: K of every head.
        impl: implementation of the losses' kernels, and of the sums over logits here.
        momentum: of the center's moving average.
        sinkhorn_impl: implementation of Sinkhorn-Knopp, `impl` if None.
    """

    def __init__(
        self,
        method: str,
        prototypes: Sequence[int],
        device: torch.device,
        impl: str,
        momentum: float = 0.9,
        sinkhorn_impl: str | None = None,
    ):
        self.sinkhorn_impl = sinkhorn_impl or impl
        self.method, self.device, self.impl, self.momentum = method, device, impl, momentum
        self.center = {kind: [torch.zeros(k, device=device) for k in prototypes] for kind in ("cls", "patch")}
        self._batch_mean: dict[str, PerHead] | None = None

    @torch.no_grad()
    def targets(self, logits: Logits, temperature: float) -> TeacherTargets:
        """Targets of this step; statistics are taken over all ranks. The centers change only in `commit`."""
        if self.method == "sinkhorn":
            scalings = sinkhorn([*logits.cls, *logits.patch], temperature, impl=self.sinkhorn_impl)
            targets = [
                Targets(entry, row, col, temperature)
                for entry, (row, col) in zip([*logits.cls, *logits.patch], scalings, strict=True)
            ]
            return TeacherTargets(targets[: len(logits.cls)], targets[len(logits.cls) :])
        if self.method == "softmax":
            self._batch_mean = self._means(logits)
        return TeacherTargets(
            *(
                [self._softmax(x, temperature, center) for x, center in zip(per_head, self.center[kind], strict=True)]
                for kind, per_head in (("cls", logits.cls), ("patch", logits.patch))
            )
        )

    def commit(self, good: Tensor) -> None:
        """Let the last batch into the centers if the step was good.

        Args:
            good: scalar on the device, 1 or 0.
        """
        for kind, means in (self._batch_mean or {}).items():
            for center, mean in zip(self.center[kind], means, strict=True):
                # NaN: no masked patch on any rank, nothing to learn from
                center.copy_(torch.where(mean.isfinite() & (good > 0), center.lerp(mean, 1 - self.momentum), center))
        self._batch_mean = None

    def norms(self) -> Tensor:
        """Norm of the centers per kind of token as in `center`, mean over the heads."""
        return torch.stack([torch.stack([center.norm() for center in heads]).mean() for heads in self.center.values()])

    def _softmax(self, logits: Tensor, temperature: float, center: Tensor) -> Targets:
        col = None if self.method == "none" else -center / temperature
        return Targets(logits, -row_logsumexp(logits, temperature, col, impl=self.impl), col, temperature)

    def _means(self, logits: Logits) -> dict[str, PerHead]:
        """Mean logits over the rows of all ranks, in one collective; NaN where no rank has a row."""
        entries = [*logits.cls, *logits.patch]
        # filled on the device: a copy from the host would wait for all that is queued there
        counts = [x.new_full((1,), len(x), dtype=torch.float32) for x in entries]
        packed = torch.cat([*(column_sum(x, impl=self.impl) for x in entries), *counts])
        if dist.is_initialized():
            dist.all_reduce(packed)
        *sums, rows = packed.split([*(x.shape[1] for x in entries), len(entries)])
        means = [total / count for total, count in zip(sums, rows, strict=True)]
        heads = len(logits.cls)
        return {"cls": means[:heads], "patch": means[heads:]}


def dino(student: Logits, teacher: list[Targets], pairing: Pairing, temperature: float, impl: str) -> Tensor:
    """DINO loss of one student, mean over images and heads.

    [ sum_j sum_g CE(t_g, local_j) + CE(t_2, global_1) + CE(t_1, global_2) ] / (2L + 2)
    """
    total = student.cls[0].new_zeros((), dtype=torch.float32)
    for local, cls, target in zip(student.local, student.cls, teacher, strict=True):
        total = total + cross_entropy(cls, target, pairing.swapped, temperature, impl=impl).sum()
        if len(local):
            total = total + cross_entropy(local, target, pairing.local, temperature, impl=impl).sum()
    images = len(student.cls[0]) // 2
    crops = len(student.local[0]) // images
    return total / (images * (2 * crops + 2) * len(teacher))


def distillation(
    student: PerHead, intact: PerHead, same_view: Tensor, temperature: float, impl: str, rows: list[Tensor]
) -> Tensor:
    """Mean over rows and heads of CE(softmax(intact / temperature), student), same view.

    Args:
        student: `[R, K]` logits of the elastic student per head.
        intact: detached logits of the intact student.
        same_view: `[R, 1]` identity pairing.
        rows: `[R]` per head, minus the logsumexp of `intact / temperature`.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for logits, reference, row in zip(student, intact, rows, strict=True):
        target = Targets(reference, row, None, temperature)
        total = total + cross_entropy(logits, target, same_view, temperature, impl=impl).mean()
    return total / len(student)


def softmax_rows(logits: PerHead, temperature: float, impl: str) -> list[Tensor]:
    """Row biases that make exp(logits / temperature + row) a softmax, per head."""
    return [-row_logsumexp(x, temperature, impl=impl) for x in logits]


def ibot(
    student: PerHead, teacher: list[Targets], weights: Tensor, crops: int, temperature: float, impl: str
) -> Tensor:
    """iBOT loss of one student: sum_m w_m CE(t_m, s_m) / crops, mean over heads.

    Args:
        student: `[M, K]` logits of the masked patches per head; the backward pass may overwrite them.
        teacher: targets of the same patches.
        weights: `[M]` fp32, 1 / (masked patches of that crop).
        crops: number of global crops, masked or not.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    same = torch.arange(len(weights), device=weights.device)[:, None]
    for logits, target in zip(student, teacher, strict=True):
        # nobody else reads a student's logits of masked patches, the largest of a step
        rows = cross_entropy(logits, target, same, temperature, impl=impl, inplace_backward=True)
        total = total + (rows * weights).sum()
    return total / (crops * len(student))


def turned(features: Tensor, held: Tensor, rows: Tensor) -> Tensor:
    """1 - cosine between features and those that they are held to, the mean over some rows; 0 if there are none.

    Args:
        features: `[B, D]`.
        held: `[B, D]`, in the same order of channels.
        rows: `[B]` bool, those that count.
    """
    cosine = torch.nn.functional.cosine_similarity(features.float(), held.float(), dim=-1)
    return ((1 - cosine) * rows).sum() / rows.sum().clamp(min=1)


def koleo(cls: Tensor, group: int, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko entropy loss (Sablayrolles et al. 2019), summed over the two global crops.

        - mean_b log( || z_b - z_nearest(b) || + eps ),  z = x / ||x||,  neighbours within groups of images

    Args:
        cls: `[2B, D]` features before the heads.
        group: images among which a neighbour is sought; divides B.
    """
    z = torch.nn.functional.normalize(cls.float(), dim=-1)
    z = z.view(-1, group, 2, z.shape[-1]).transpose(1, 2)  # [B / group, 2, group, D]
    with torch.no_grad():
        similarity = z @ z.mT
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)
        nearest = similarity.argmax(-1, keepdim=True).expand(-1, -1, -1, z.shape[-1])
    distance = (z - z.gather(2, nearest) + eps).norm(dim=-1)
    return -(distance + eps).log().mean(dim=(0, 2)).sum()
