"""A step of the method as a textbook writes it: one process, whole targets, torch's own optimizer.

It is the rival of `pipeline.bench step --against plain` and, in fp64, the oracle of the step tests; so it shares the
backbones, the layers of heads and the random draws with training, but no product with prototypes, no loss, no target,
no layout and no kernel.

Letters: B images of a rank, L local crops, H heads with K prototypes, M masked patches, N patches of a global crop.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ExperimentConfig
from pipeline.elastic import Subnet
from pipeline.elastic.head import ProjectionHead
from pipeline.elastic.stochastic_depth import keep_indices
from pipeline.engine.groups import MODULES, parameter_groups
from pipeline.method.schedules import StepValues
from pipeline.method.tri_branch import Branch

PerHead = list[Tensor]


class Inputs(NamedTuple):
    """The batch of all ranks, image-major.

    Attributes:
        global_crops: `[2B R, C, S, S]`.
        local_crops: `[L B R, C, s, s]`.
        masks: `[2B R, N]` bool.
        weights: `[M]`, 1 / (masked patches of that crop).
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    weights: Tensor

    @classmethod
    def of(cls, global_crops: Tensor, local_crops: Tensor, masks: np.ndarray) -> "Inputs":
        on_device = torch.from_numpy(masks).to(global_crops.device)
        per_crop = 1 / on_device.sum(1).clamp(min=1)
        weights = per_crop.repeat_interleave(on_device.shape[1])[on_device.flatten()].to(global_crops.dtype)
        return cls(global_crops, local_crops, on_device, weights)


class Seen(NamedTuple):
    """What one student made of the batch.

    Attributes:
        cls: per rank, un-projected cls tokens `[2B, D]` of global crops.
        global_, local, patch: per head, logits of global crops, local crops and masked patches of all ranks.
    """

    cls: list[Tensor]
    global_: PerHead
    local: PerHead
    patch: PerHead


class Plain:
    """Student, teacher, AdamW with a group per layer, and a step over the batches of any number of ranks at once.

    Args:
        config: the experiment.
        student: in any precision, on any device; it is moved.
        device: where to train.
        dtype: of weights, gradients, moments and activations.
        eps: of AdamW.
        lap: told the name of each part of a step when it is done.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        student: Branch,
        device: torch.device,
        dtype: torch.dtype,
        eps: float = 1e-8,
        lap: Callable[[str], None] = lambda part: None,
    ):
        self.config, self.lap = config, lap
        self.specs = parameter_groups(student, config.optim)
        self.student = student.to(device, dtype)
        self.teacher = copy.deepcopy(self.student)
        named = dict(self.student.named_parameters())
        groups = [{"params": [named[name] for name in spec.names]} for spec in self.specs]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=eps)
        sizes = config.heads.prototypes
        self.center = {kind: [torch.zeros(k, dtype=dtype, device=device) for k in sizes] for kind in ("cls", "patch")}

    def step(
        self, number: int, values: StepValues, inputs: Inputs, subnets: Sequence[Subnet | None]
    ) -> dict[str, Tensor]:
        """Train once.

        Args:
            number: steps before this one, the key of the random draws.
            values: of this step.
            inputs: batches of all ranks.
            subnets: the elastic student of each rank; None on all for the intact one alone.

        Returns:
            Loss terms by "term/branch", and "total".
        """
        losses = self._losses(number, values, inputs, subnets)
        self.lap("elastic")
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.lap("backward")
        self._update(values)
        return {name: loss.detach() for name, loss in losses.items()}

    def _losses(
        self, number: int, values: StepValues, inputs: Inputs, subnets: Sequence[Subnet | None]
    ) -> dict[str, Tensor]:
        loss = self.config.loss
        targets = self._targets(inputs, values.teacher_temp)
        self.lap("teacher")
        full = [self.student.backbone.grid.largest] * len(subnets)
        intact = self._see(number, 0, inputs, full)
        losses = self._own("intact", intact, targets, inputs)
        elastic_students = [subnet for subnet in subnets if subnet]
        if not elastic_students:  # the objective of DINOv2
            own = losses["dino/intact"] + loss.ibot_weight * losses["ibot/intact"]
            losses["total"] = own + loss.koleo_weight * losses["koleo/intact"]
            return losses
        elastic = self._see(number, 1, inputs, elastic_students)
        losses |= self._own("elastic", elastic, targets, inputs)
        for name, teach, learn in (
            ("distill_global", intact.global_, elastic.global_),
            ("distill_local", intact.local, elastic.local),
        ):
            losses[f"{name}/elastic"] = _mean(
                [
                    cross_entropy(_softmax(t.detach(), loss.student_temp), s, loss.student_temp).mean()
                    for t, s in zip(teach, learn, strict=True)
                ]
            )
        weighed = {
            name: losses[f"dino/{name}"] + loss.ibot_weight * losses[f"ibot/{name}"] for name in ("intact", "elastic")
        }
        distilled = losses["distill_global/elastic"] + losses["distill_local/elastic"]
        spread = (losses["koleo/intact"] + losses["koleo/elastic"]) / 2
        elastic_loss = loss.cross_view_weight * weighed["elastic"] + loss.same_view_weight * distilled
        losses["total"] = (
            loss.intact_weight * weighed["intact"]
            + (1 - loss.intact_weight) * elastic_loss
            + loss.koleo_weight * spread
        )
        return losses

    def _own(self, name: str, seen: Seen, targets: dict[str, PerHead], inputs: Inputs) -> dict[str, Tensor]:
        """The terms of one student that know nothing of the other."""
        return {
            f"dino/{name}": self._dino(seen, targets["cls"]),
            f"ibot/{name}": self._ibot(seen, targets["patch"], inputs),
            f"koleo/{name}": _koleo(seen.cls),
        }

    @torch.no_grad()
    def _targets(self, inputs: Inputs, temperature: float) -> dict[str, PerHead]:
        """Teacher distributions of cls tokens `[2B R, K]` and masked patches `[M, K]`."""
        full = self.teacher.backbone.grid.largest
        cls, patches = _features(self.teacher, inputs.global_crops, full)
        logits = dict(zip(("cls", "patch"), _logits(self.teacher, [cls, patches[inputs.masks.flatten()]]), strict=True))
        if self.config.loss.centering == "sinkhorn":
            return {kind: [_sinkhorn(x, temperature) for x in heads] for kind, heads in logits.items()}
        out = {
            kind: [_softmax(x - c, temperature) for x, c in zip(heads, self.center[kind], strict=True)]
            for kind, heads in logits.items()
        }
        for kind, heads in logits.items():
            for center, x in zip(self.center[kind], heads, strict=True):
                if len(x):
                    center.mul_(0.9).add_(0.1 * x.mean(0))
        return out

    def _see(self, number: int, branch: int, inputs: Inputs, subnets: Sequence[Subnet]) -> Seen:
        """Every rank's share of the batch by that rank's sub-network, joined again."""
        data, backbone = self.config.data, self.student.backbone
        images, local = data.batch_size, data.local_crops.count
        cls, parts = [], []
        for rank, subnet in enumerate(subnets):
            keep = keep_indices(
                data.seed,
                number,
                rank,
                branch,
                self.config.model.drop_path,
                (2 * images, local * images),
                backbone.num_draws,
                inputs.masks.device,
            )
            mine = slice(2 * images * rank, 2 * images * (rank + 1))
            theirs = slice(local * images * rank, local * images * (rank + 1))
            masks = inputs.masks[mine]
            tokens, patches = _features(
                self.student, inputs.global_crops[mine], subnet, masks, keep[0] if keep else None
            )
            small, _ = _features(self.student, inputs.local_crops[theirs], subnet, None, keep[1] if keep else None)
            cls.append(tokens)
            parts.append(_logits(self.student, [tokens, small, patches[masks.flatten()]]))
        return Seen(cls, *([torch.cat(head) for head in zip(*kind, strict=True)] for kind in zip(*parts, strict=True)))

    def _dino(self, seen: Seen, targets: PerHead) -> Tensor:
        loss, local = self.config.loss, self.config.data.local_crops.count
        heads = []
        for target, global_, small in zip(targets, seen.global_, seen.local, strict=True):
            t = target.view(-1, 2, target.shape[-1])  # [B R, 2, K]
            s = global_.view(t.shape)
            terms = cross_entropy(t[:, 1], s[:, 0], loss.student_temp) + cross_entropy(
                t[:, 0], s[:, 1], loss.student_temp
            )
            for crop in small.view(len(t), local, -1).unbind(1):
                for view in (0, 1):
                    terms = terms + cross_entropy(t[:, view], crop, loss.student_temp)
            heads.append(terms.mean() / (2 * local + 2))
        return _mean(heads)

    def _ibot(self, seen: Seen, targets: PerHead, inputs: Inputs) -> Tensor:
        temperature = self.config.loss.student_temp
        return _mean(
            [
                (inputs.weights * cross_entropy(t, s, temperature)).sum() / len(inputs.masks)
                for t, s in zip(targets, seen.patch, strict=True)
            ]
        )

    def _update(self, values: StepValues) -> None:
        for module in MODULES:
            torch.nn.utils.clip_grad_norm_(getattr(self.student, module).parameters(), self.config.optim.clip_grad)
        self.lap("reduce")
        for spec, group in zip(self.specs, self.optimizer.param_groups, strict=True):
            frozen = spec.prototypes and values.prototypes_frozen
            group["lr"] = 0.0 if frozen else values.lr * spec.lr_scale
            group["weight_decay"] = values.weight_decay if spec.decayed and not frozen else 0.0
        self.optimizer.step()
        self.lap("optimizer")
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(values.momentum).add_(s, alpha=1 - values.momentum)
        self.lap("ema")


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """`[R, K]` distributions and logits -> `[R]`."""
    return -(target * F.log_softmax(_wide(logits) / temperature, -1)).sum(-1)


def _features(
    branch: Branch, images: Tensor, subnet: Subnet, masks: Tensor | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cls tokens `[R, D]` and patches `[R N, D]` of one kind of crops."""
    features = branch.backbone.forward_crops([images], subnet, [masks], None if keep is None else [keep])[0]
    return features.cls, features.patches.flatten(0, 1)


def _logits(branch: Branch, parts: Sequence[Tensor]) -> list[PerHead]:
    """Per part `[R_p, D]` and head, cosines to the prototypes, times their gains."""
    x, per_head = torch.cat(list(parts)), []
    for head in cast(Iterable[ProjectionHead], branch.heads.heads):
        prototypes = F.normalize(head.prototypes, dim=-1)
        if head.prototypes_gain is not None:
            prototypes = prototypes * head.prototypes_gain
        logits = F.normalize(head.mlp(x), dim=-1) @ prototypes.T
        per_head.append(logits.split([len(part) for part in parts]))
    return [list(part) for part in zip(*per_head, strict=True)]


def _sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    if not len(logits):
        return logits
    q = torch.exp(_wide(logits) / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(_wide(logits) / temperature, -1)


def _koleo(per_rank: list[Tensor]) -> Tensor:
    """Neighbours within the images of a rank, view by view."""
    terms = []
    for cls in per_rank:
        for view in (0, 1):
            z = F.normalize(_wide(cls[view::2]), dim=-1)
            apart = torch.cdist(z, z) + torch.eye(len(z), device=z.device) * 1e9
            near = z[apart.argmin(1).detach()]
            terms.append(-torch.log((z - near + 1e-8).norm(dim=1) + 1e-8).mean())
    return torch.stack(terms).sum() / len(per_rank)


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(heads: list[Tensor]) -> Tensor:
    return torch.stack(heads).mean()
