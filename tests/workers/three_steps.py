"""Three steps (or run.max_steps) of the method, by the engine or by plain PyTorch; saves losses and weights.

Usage: three_steps.py engine|plain64|plain32 VIRTUAL_RANKS CONFIG OUT [CONFIG OUT ...]

Plain PyTorch knows nothing of DeepSpeed, of factored targets or of ranks: one process computes what `VIRTUAL_RANKS`
ranks should, from materialised targets, as the formulas of the paper read. In fp64 it is the truth. `plain32` shows
what fp32 costs on the processor and with the libraries at hand: `ROUNDINGS` times the same, each time with the images
moved by a unit in the last place, since it is chance whether a sum or an activation near ReLU's kink is rounded up.
"""

import copy
import sys
from contextlib import nullcontext
from types import MethodType
from unittest import mock

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ExperimentConfig, load_config
from pipeline.data.loader import Loader
from pipeline.data.masks import block_masks
from pipeline.elastic import Subnet
from pipeline.elastic.stochastic_depth import keep_indices
from pipeline.engine import distributed
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import MODULES, parameter_groups
from pipeline.method.schedules import Schedules, StepValues
from pipeline.run.step import Trainer, build_student

STEPS = 3
ROUNDINGS = 2
EPS = 1e-4  # AdamW's default 1e-8 turns rounding noise of vanishing gradients into full steps


def all_masks(config: ExperimentConfig, step: int, images: int, grid: tuple[int, int], values: StepValues):
    """Masks of the whole batch, so that any split over ranks sees the same."""
    loss = config.loss
    probability = loss.mask_probability if values.ibot else 0.0
    return block_masks(config.data.seed, step, 0, 2 * images, grid, probability, loss.mask_ratio)


def by_engine(config: ExperimentConfig, ranks: Ranks) -> dict:
    trainer = Trainer(config, ranks)
    trainer.start_data(0)
    for group in trainer.engine.optimizer.param_groups:
        group["eps"] = EPS

    def masks(self: Trainer, step: int, values: StepValues):
        share = 2 * config.data.batch_size
        every = all_masks(config, step, trainer.global_batch, trainer.patch_grid, values)
        return every[ranks.rank * share : (ranks.rank + 1) * share]

    trainer._masks = MethodType(masks, trainer)
    with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
        losses = [trainer.step(step).agreed.losses for step in range(config.run.max_steps or STEPS)]
    weights = {"student": {}, "teacher": {}}
    for group in trainer.engine.groups:
        spec = group.spec
        for branch, shard in (("student", group.master), ("teacher", group.ema)):
            flat = torch.full((spec.numel,), torch.nan)
            for pieces, part in ranks.gather((group.pieces, shard.detach().cpu())):
                for piece in pieces:
                    flat[piece.there] = part[piece.here]
            for name, shape, offset, size in zip(spec.names, spec.shapes, spec.offsets, spec.sizes, strict=True):
                weights[branch][name] = flat[offset : offset + size].view(shape).clone()
    with trainer.engine.whole_teacher() as branch:
        teacher = {name: p.detach().clone() for name, p in branch.named_parameters()}
    net = trainer.engine.engine.module
    sharded = config.engine.zero_stage == 3
    with deepspeed.zero.GatheredParameters(list(net.parameters())) if sharded else nullcontext():
        student = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer.close()
    return {
        "losses": losses,
        "all_reduces": all_reduce.call_count / len(losses),
        "groups": len(trainer.engine.groups),
        **weights,
        "working": {"teacher": teacher, "student": student},
        "center": trainer.tri_branch.centering.center,
    }


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    q = torch.exp(logits / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return -(target * F.log_softmax(logits / temperature, -1)).sum(-1)


def last_place(x: Tensor, seed: int) -> Tensor:
    """Move every number by a unit in its last place, up or down or not at all; seed 0 moves none."""
    moves = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return x * (1 + moves * torch.finfo(x.dtype).eps) if seed else x


def by_plain_torch(
    config: ExperimentConfig, subnets: list[list[Subnet]], dtype: torch.dtype, rounding: int = 0
) -> dict:
    ranks = len(subnets[0])
    images = config.data.batch_size * ranks
    local = config.data.local_crops.count
    loader = Loader(config.data.model_copy(update={"batch_size": images}))
    schedules, loss = Schedules(config.optim, config.loss, images), config.loss
    student = build_student(config)
    specs = parameter_groups(student, config.optim)
    student.to(dtype)
    teacher = copy.deepcopy(student)
    named = dict(student.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [named[n] for n in s.names]} for s in specs], betas=(0.9, 0.999), eps=EPS)
    full, grid = student.backbone.grid.largest, student.backbone.patch_grid(config.data.global_crops.size)
    heads = range(len(config.heads.prototypes))
    center = {kind: [torch.zeros(k, dtype=dtype) for k in config.heads.prototypes] for kind in ("cls", "patch")}
    losses = []
    for step in range(config.run.max_steps or STEPS):
        values, batch = schedules.at(step), next(loader)
        masks = torch.from_numpy(all_masks(config, step, images, grid, values))
        g, loc = (last_place(crops, rounding).to(dtype) for crops in batch)
        masked = masks.flatten().nonzero()[:, 0]
        weights = (1 / masks.sum(1).clamp(min=1)).repeat_interleave(masks.shape[1])[masked].to(dtype)

        def forward(model, images_, subnet, masks_=None, keep=None):
            f = model.backbone.forward_crops([images_], subnet, [masks_], None if keep is None else [keep])[0]
            return f.cls, f.patches.flatten(0, 1)

        with torch.no_grad():
            t_cls, t_patch = forward(teacher, g, full)
            logits = {"cls": teacher.heads([t_cls])[0], "patch": teacher.heads([t_patch[masked]])[0]}
        if loss.centering == "sinkhorn":
            targets = {
                kind: [sinkhorn(x, values.teacher_temp) if len(x) else x for x in per_head]
                for kind, per_head in logits.items()
            }
        else:
            targets = {
                kind: [torch.softmax((x - center[kind][h]) / values.teacher_temp, -1) for h, x in enumerate(per_head)]
                for kind, per_head in logits.items()
            }
            for kind, per_head in logits.items():
                for h, x in enumerate(per_head):
                    if len(x):
                        center[kind][h] = 0.9 * center[kind][h] + 0.1 * x.mean(0)

        def students(subnet_of_rank, branch):
            """Features of every rank's share by that rank's sub-network, joined again."""
            cls_g, cls_l, patch = [], [], []
            for r, subnet in enumerate(subnet_of_rank):
                b, backbone = config.data.batch_size, student.backbone
                draw = step, r, branch, config.model.drop_path, (2 * b, local * b), backbone.num_draws, "cpu"
                keep = keep_indices(config.data.seed, *draw)
                mine = slice(2 * b * r, 2 * b * (r + 1))
                c, p = forward(student, g[mine], subnet, masks[mine], keep[0])
                chosen = masks[mine].flatten().nonzero()[:, 0]
                c_l, _ = forward(student, loc[local * b * r : local * b * (r + 1)], subnet, None, keep[1])
                parts = student.heads([c, c_l, p[chosen]])
                cls_g.append((c, parts[0]))
                cls_l.append(parts[1])
                patch.append(parts[2])
            join = lambda per_rank: [torch.cat([x[h] for x in per_rank]) for h in heads]  # noqa: E731
            return [c for c, _ in cls_g], join([p for _, p in cls_g]), join(cls_l), join(patch)

        def objective(name, features, g_logits, l_logits, p_logits):
            dino = ibot = 0.0
            for h in heads:
                t = targets["cls"][h].view(images, 2, -1)
                s_g, s_l = g_logits[h].view(images, 2, -1), l_logits[h].view(images, local, -1)
                terms = cross_entropy(t[:, 1], s_g[:, 0], 0.1) + cross_entropy(t[:, 0], s_g[:, 1], 0.1)
                for j in range(local):
                    terms = terms + cross_entropy(t[:, 0], s_l[:, j], 0.1) + cross_entropy(t[:, 1], s_l[:, j], 0.1)
                dino = dino + terms.mean() / (2 * local + 2) / len(heads)
                ce = cross_entropy(targets["patch"][h], p_logits[h], 0.1)
                ibot = ibot + (weights * ce).sum() / (2 * images) / len(heads)
            koleo = 0.0
            for group in features:
                for view in (0, 1):
                    z = F.normalize(group[view::2], dim=-1)
                    d = torch.cdist(z, z) + torch.eye(len(z)) * 1e9
                    near = d.argmin(1).detach()
                    koleo = koleo - torch.log((z - z[near] + 1e-8).norm(dim=1) + 1e-8).mean() / ranks
            record[f"dino/{name}"], record[f"koleo/{name}"] = dino, koleo
            record[f"ibot/{name}"] = ibot
            return dino + loss.ibot_weight * ibot, koleo

        record: dict = {}
        features, i_g, i_l, i_p = students([full] * ranks, 0)
        intact, koleo_intact = objective("intact", features, i_g, i_l, i_p)
        features, e_g, e_l, e_p = students(subnets[step], 1)
        elastic, koleo_elastic = objective("elastic", features, e_g, e_l, e_p)
        same = {"distill_global/elastic": (i_g, e_g), "distill_local/elastic": (i_l, e_l)}
        for name, (teach, learn) in same.items():
            record[name] = sum(
                cross_entropy(torch.softmax(teach[h].detach() / 0.1, -1), learn[h], 0.1).mean() for h in heads
            ) / len(heads)
            elastic = elastic + record[name]
        w = loss.intact_weight
        total = w * intact + (1 - w) * elastic + loss.koleo_weight * (koleo_intact + koleo_elastic) / 2
        record["total"] = total
        optimizer.zero_grad()
        total.backward()
        for module in MODULES:
            torch.nn.utils.clip_grad_norm_(getattr(student, module).parameters(), config.optim.clip_grad)
        for spec, group in zip(specs, optimizer.param_groups, strict=True):
            frozen = spec.prototypes and values.prototypes_frozen
            group["lr"] = 0.0 if frozen else values.lr * spec.lr_scale
            group["weight_decay"] = values.weight_decay if spec.decayed and not frozen else 0.0
        optimizer.step()
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.mul_(values.momentum).add_(s, alpha=1 - values.momentum)
        losses.append({name: float(torch.as_tensor(value).detach()) for name, value in record.items()})
    loader.close()
    return {
        "losses": losses,
        "student": {n: p.detach() for n, p in student.named_parameters()},
        "teacher": {n: p.detach() for n, p in teacher.named_parameters()},
        "center": center,
    }


def draws(config: ExperimentConfig, ranks: int) -> list[list[Subnet]]:
    from functools import partial

    from pipeline.elastic import cost
    from pipeline.elastic.sampling import SubnetSampler
    from pipeline.elastic.subnet import Grid

    grid = Grid(config.model, config.sampling.small_bias)
    sampler = SubnetSampler(
        grid, partial(cost.flops, config.model), ranks, config.sampling.assignment, config.data.seed
    )
    return [[sampler.draw(step, rank) for rank in range(ranks)] for step in range(config.run.max_steps or STEPS)]


def plain(mode: str, config: ExperimentConfig, subnets: list[list[Subnet]]) -> dict | list[dict]:
    if mode == "plain64":
        return by_plain_torch(config, subnets, torch.float64)
    return [by_plain_torch(config, subnets, torch.float32, rounding) for rounding in range(ROUNDINGS)]


def main() -> None:
    mode, virtual, *files = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = distributed.initialize() if mode == "engine" else None
    for path, out in zip(files[::2], files[1::2], strict=True):
        config = load_config(path)
        result = by_engine(config, ranks) if ranks else plain(mode, config, draws(config, int(virtual)))
        if ranks is None or ranks.is_main:
            torch.save(result, out)
    if ranks:
        distributed.shut_down()


if __name__ == "__main__":
    main()
