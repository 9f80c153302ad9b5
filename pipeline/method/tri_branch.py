"""One step of the method: teacher, intact student, elastic student -> losses.

Letters: B images, L local crops, N patches of a global crop, M masked patches, D channels, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kernels.distillation import Targets
from pipeline.config import LossConfig
from pipeline.elastic.backbone import Backbone, Features
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.stochastic_depth import keep_indices
from pipeline.elastic.subnet import Subnet
from pipeline.elastic.transfer import to_device
from pipeline.method import losses
from pipeline.method.losses import Centering, Logits, Pairing, TeacherTargets
from pipeline.method.schedules import StepValues

TERMS = (
    ("dino", "intact"),
    ("dino", "elastic"),
    ("ibot", "intact"),
    ("ibot", "elastic"),
    ("koleo", "intact"),
    ("koleo", "elastic"),
    ("anchor", "intact"),
    ("distill_global", "elastic"),
    ("distill_local", "elastic"),
)
"""Every loss term that a step may have, as (term, branch)."""


@dataclass(frozen=True)
class Crops:
    """Crops of one rank's batch, image-major, with the iBOT masks of its global crops.

    Attributes:
        global_: `[2B, C, S, S]`.
        local: `[BL, C, s, s]`, L may be 0.
        masks: `[2B, N]` bool, True where a patch is replaced by the mask token.
        masked: `[M]` int64, positions of the True entries in the flattened masks.
        mask_weights: `[M]` fp32, 1 / (masked patches of that crop).
    """

    global_: Tensor
    local: Tensor
    masks: Tensor
    masked: Tensor
    mask_weights: Tensor

    @classmethod
    def of(cls, global_crops: Tensor, local_crops: Tensor, masks: np.ndarray) -> "Crops":
        """Join crops on a device and masks `[2B, N]` from the host; the index is made there, without a device sync."""
        device = global_crops.device
        masked = np.flatnonzero(masks)
        per_crop = masks.sum(1, keepdims=True).clip(min=1)
        weights = np.broadcast_to(1 / per_crop, masks.shape).reshape(-1)[masked].astype(np.float32)
        return cls(
            global_crops, local_crops, *(to_device(torch.from_numpy(x), device) for x in (masks, masked, weights))
        )

    @property
    def images(self) -> int:
        return len(self.global_) // 2

    def student_inputs(self) -> tuple[list[Tensor], list[Tensor | None]]:
        if not len(self.local):
            return [self.global_], [self.masks]
        return [self.global_, self.local], [self.masks, None]


class Branch(nn.Module):
    """A backbone with its projection heads: the student (intact and elastic) or the teacher."""

    backbone: Backbone
    heads: ProjectionHeads

    def __init__(self, backbone: Backbone, heads: ProjectionHeads):
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(
        self,
        images: list[Tensor],
        subnet: Subnet,
        masks: list[Tensor | None],
        masked: Tensor,
        keep: list[Tensor] | None = None,
    ) -> tuple[Logits, Tensor]:
        """Logits of all crops and masked patches.

        Args:
            images: global crops `[2B, C, S, S]` and, if any, local crops `[BL, C, s, s]`.
            subnet: the sub-network to run.
            masks: per entry of `images`, `[rows, N]` bool or None.
            masked: `[M]` positions of the patches that take part in iBOT.
            keep: samples that stochastic depth keeps, see `elastic.stochastic_depth`.

        Returns:
            The logits, and the un-projected cls tokens `[2B, D]` of the global crops.
        """
        features = self.backbone(images, subnet, masks, keep)
        cls, patches = features[0]
        local = features[1].cls if len(features) > 1 else cls[:0]
        chosen = patches.reshape(-1, patches.shape[-1]).index_select(0, masked)
        return Logits(*self.heads([local, cls, chosen])), cls


@dataclass
class StepLosses:
    """Loss terms of a step by (term, branch), fp32 scalars; `total` is their weighted sum."""

    terms: dict[tuple[str, str], Tensor]
    total: Tensor


class Observer(Protocol):
    """Whoever is shown a step from inside; it keeps no logits and changes nothing."""

    def teacher(self, targets: list[Targets], cls: Tensor) -> None:
        """Targets of the cls tokens per head, and the teacher's features `[2B, D]`."""

    def student(self, branch: str, logits: list[Tensor], cls: Tensor) -> None:
        """Logits `[2B, K]` of the global crops per head and features `[2B, D]` of the "intact" or "elastic" student."""


class StochasticDepth(NamedTuple):
    """Seed and rate of stochastic depth, and the draws of one forward pass (`Backbone.num_draws`)."""

    seed: int
    rate: float
    draws: int


class TriBranch:
    """The losses of a step and their gradients, in the order that keeps one student graph alive at a time.

    The intact student has lambda of the weight of DINO and iBOT, the elastic one the rest, and each half of that of
    KoLeo; what the elastic one learns from the teacher and from the intact one has a factor each, 1 in the paper. A
    term of weight 0 is not computed. Without an elastic student the intact one has all of the three, which is the
    objective of DINOv2.

    Args:
        loss: weights and temperatures.
        full: the largest network, which teacher and intact student run.
        drop: stochastic depth of the students.
        centering: makes targets of the teacher's logits.
        lap: told the name of each part of the step when it is done.
        anchor: features of images by a frozen network that the intact student is held to, if there is one.
    """

    def __init__(
        self,
        loss: LossConfig,
        full: Subnet,
        drop: StochasticDepth,
        centering: Centering,
        lap: Callable[[str], None] = lambda part: None,
        anchor: Callable[[Tensor], Features] | None = None,
    ):
        self.loss, self.full, self.drop, self.centering, self.lap = loss, full, drop, centering, lap
        self.anchor = anchor
        self.impl, self.device = centering.impl, centering.device

    @torch.no_grad()
    def teacher_targets(
        self,
        teacher: Callable[..., tuple[Logits, Tensor]],
        crops: Crops,
        values: StepValues,
        observer: Observer | None = None,
    ) -> TeacherTargets:
        """Run the teacher on the unmasked global crops."""
        logits, cls = teacher([crops.global_], self.full, [None], crops.masked)
        targets = self.centering.targets(logits, values.teacher_temp)
        if observer:
            observer.teacher(targets.cls, cls)
        self.lap("teacher")
        return targets

    def run(
        self,
        student: Callable[..., tuple[Logits, Tensor]],
        backward: Callable[[Tensor], None],
        crops: Crops,
        targets: TeacherTargets,
        subnet: Subnet | None,
        step: int,
        rank: int,
        observer: Observer | None = None,
    ) -> StepLosses:
        """Forward and backward of the intact, then of the elastic student, if there is one.

        Args:
            student: the engine around the student `Branch`.
            backward: called once with each student's loss, `passes(subnet)` times.
            crops, targets: of this step.
            subnet: the elastic student of this rank; None to train the intact one alone.
            step, rank: key of the random draws.
            observer: is shown both students.
        """
        share = 1.0 if subnet is None else self.loss.intact_weight
        pairing = Pairing.of(crops.images, len(crops.local) // crops.images, self.device)
        terms: dict[tuple[str, str], Tensor] = {}

        logits, cls = student(*self._inputs(crops, self.full, step, rank, branch=0))
        intact = self._self_distillation(logits, targets, crops, pairing, "intact", terms)
        spread = 1 / self.passes(subnet)
        intact_loss = share * intact + spread * self._spread(cls, crops, "intact", terms)
        if self.anchor and self.loss.anchor_weight:
            terms["anchor", "intact"] = term = self._away(cls, crops, self.anchor)
            intact_loss = intact_loss + self.loss.anchor_weight * term
        if observer:
            observer.student("intact", logits.cls, cls)
        self.lap("intact")
        backward(intact_loss)
        self.lap("backward")
        if subnet is None:
            return StepLosses({k: v.detach() for k, v in terms.items()}, intact_loss.detach())
        reference = Logits(*([x.detach() for x in per_head] for per_head in (logits.local, logits.cls, [])))
        del logits, cls, intact

        logits, cls = student(*self._inputs(crops, subnet, step, rank, branch=1))
        elastic = torch.zeros((), device=self.device)
        if self.loss.cross_view_weight:
            own = self._self_distillation(logits, targets, crops, pairing, "elastic", terms)
            elastic = elastic + self.loss.cross_view_weight * own
        if self.loss.same_view_weight:
            from_intact = self._from_intact(logits, reference, pairing, terms)
            elastic = elastic + self.loss.same_view_weight * from_intact
        elastic_loss = (1 - share) * elastic + spread * self._spread(cls, crops, "elastic", terms)
        if observer:
            observer.student("elastic", logits.cls, cls)
        self.lap("elastic")
        backward(elastic_loss)
        self.lap("backward")
        return StepLosses({k: v.detach() for k, v in terms.items()}, (intact_loss + elastic_loss).detach())

    @staticmethod
    def passes(subnet: Subnet | None) -> int:
        """Students, and so backward passes, of a step."""
        return 1 if subnet is None else 2

    def _inputs(self, crops: Crops, subnet: Subnet, step: int, rank: int, branch: int) -> tuple:
        images, masks = crops.student_inputs()
        sizes, drop = [len(x) for x in images], self.drop
        keep = keep_indices(drop.seed, step, rank, branch, drop.rate, sizes, drop.draws, self.device)
        return images, subnet, masks, crops.masked, keep

    def _self_distillation(
        self,
        logits: Logits,
        targets: TeacherTargets,
        crops: Crops,
        pairing: Pairing,
        branch: str,
        terms: dict[tuple[str, str], Tensor],
    ) -> Tensor:
        """DINO + iBOT of one student against the teacher."""
        loss, temp = self.loss, self.loss.student_temp
        terms["dino", branch] = total = losses.dino(logits, targets.cls, pairing, temp, self.impl)
        if len(crops.masked):
            patch = losses.ibot(logits.patch, targets.patch, crops.mask_weights, 2 * crops.images, temp, self.impl)
            terms["ibot", branch] = patch
            total = total + loss.ibot_weight * patch
        return total

    def _spread(self, cls: Tensor, crops: Crops, branch: str, terms: dict[tuple[str, str], Tensor]) -> Tensor:
        """Weighted KoLeo of one student."""
        loss = self.loss
        if not loss.koleo_weight:
            return torch.zeros((), device=self.device)
        terms["koleo", branch] = term = losses.koleo(cls, loss.koleo_group or crops.images)
        return loss.koleo_weight * term

    def _away(self, cls: Tensor, crops: Crops, anchor: Callable[[Tensor], Features]) -> Tensor:
        """How far the features of unmasked global crops have turned away from the frozen network's."""
        with torch.no_grad():
            held = anchor(crops.global_).cls
        return losses.turned(cls, held, ~crops.masks.any(1))

    def _from_intact(
        self, logits: Logits, reference: Logits, pairing: Pairing, terms: dict[tuple[str, str], Tensor]
    ) -> Tensor:
        """Intact -> elastic distillation over the global and, if there are any, the local rows."""
        temp = self.loss.student_temp
        total = torch.zeros((), device=self.device)
        for name, student, intact, same in (
            ("distill_global", logits.cls, reference.cls, pairing.global_same),
            ("distill_local", logits.local, reference.local, pairing.local_same),
        ):
            if not len(same):
                continue
            rows = losses.softmax_rows(intact, temp, self.impl)
            terms[name, "elastic"] = term = losses.distillation(student, intact, same, temp, self.impl, rows)
            total = total + term
        return total
