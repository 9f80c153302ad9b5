"""What a config asks for, on paper: sub-networks, parameters, FLOPs, memory; `poa plan` for N GPUs."""

import argparse
import json
from typing import Any, get_args

from pipeline import forecast
from pipeline.config import EngineConfig, ExperimentConfig, dump_config, load_config
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, Subnet
from pipeline.engine.sizes import BUCKET
from pipeline.errors import UserError

_GIB = 1 << 30
# Activations that the backward pass of one block keeps per token, in multiples of its width: input of both norms, qkv,
# attention output, both sides of the 4x MLP, and the two residual sums. Counted from the operations of a ViT block.
_KEPT_PER_TOKEN = 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4 + 1


def subnet_rows(config: ExperimentConfig) -> list[dict]:
    """One entry per sub-network: name, width, depths, params, gflops (one image of the training size), multiplicity."""
    grid = Grid(config.model, config.sampling.small_bias)
    return [
        {
            "name": subnet.name,
            "width": subnet.width,
            "depths": list(subnet.depths),
            "params": cost.params(config.model, subnet),
            "gflops": cost.flops(config.model, subnet) / 1e9,
            "multiplicity": grid.multiplicity(subnet),
        }
        for subnet in grid.subnets
    ]


def subnet_table(config: ExperimentConfig) -> str:
    """The sub-networks as a table, the paper's names beside those that have one."""
    grid = Grid(config.model, config.sampling.small_bias)
    alias = {subnet: name for name, subnet in grid.aliases.items()}
    lines = [f"{'name':>16}  {'params':>9}  {'GFLOPs':>8}  {'drawn':>5}"]
    for row, subnet in zip(subnet_rows(config), grid.subnets, strict=True):
        drawn = "full" if subnet == grid.largest and len(grid) > 1 else row["multiplicity"]
        lines.append(
            f"{row['name']:>16}  {row['params'] / 1e6:>7.2f} M  {row['gflops']:>8.3g}  {drawn:>5}"
            + (f"  {alias[subnet]}" if subnet in alias else "")
        )
    entries = sum(row["multiplicity"] for row in subnet_rows(config))
    lines.append(f"{len(grid)} sub-networks, {entries} entries; `full` is the intact student, trained at every step")
    return "\n".join(lines)


def memory_estimate(config: ExperimentConfig, world_size: int = 1, stage: int | None = None) -> dict[str, float]:
    """Bytes per GPU by purpose, at a ZeRO stage (the config's if None).

    Weights, gradients, optimizer state and logits follow from shapes; activations are an estimate for uncompiled ViT
    blocks (Swin and ResNet keep a similar multiple of their maps).
    """
    largest = Grid(config.model).largest
    low = 2 if config.engine.precision == "bf16" else 4
    stage = config.engine.effective_stage(stage)
    count = cost.trained_params(config).total
    shards = world_size if stage == 3 else 1
    block = cost.largest_block_params(config.model) if stage == 3 else 0
    bucket = min(block, BUCKET)
    rows = config.data.batch_size * (2 * (1 + cost.masked_patches(config)) + config.data.local_crops.count)
    return {
        "weights (student, teacher)": 2.0 * low * count / shards,
        "gathered weights (estimate)": 1.0 * low * min(count, block + bucket),  # one in use, one fetched ahead
        "gradients": 1.0 * low * (count / shards + bucket),
        "fp32 master, AdamW, EMA": 0.0 if config.engine.offload_optimizer else state_bytes(config, world_size, stage),
        "activations (estimate)": _activations(config, largest, low),
        # student's logits with their gradient, the intact student's copy, and the teacher's
        "logits": 4.0 * low * rows * sum(config.heads.prototypes),
    }


def state_bytes(config: ExperimentConfig, world_size: int, stage: int) -> float:
    """Bytes of a rank's fp32 masters, moments and EMA, on the GPU or, offloaded, in the host's memory."""
    count = cost.trained_params(config).total
    # ZeRO-0 trains the fp32 weights themselves: no master apart from them
    return 4.0 * 3 * count if stage == 0 else 4.0 * 4 * count / world_size


def offloaded_bytes(config: ExperimentConfig, world_size: int) -> float:
    """Bytes of a rank's optimizer state in the host's memory."""
    return state_bytes(config, world_size, config.engine.effective_stage()) if config.engine.offload_optimizer else 0.0


def _activations(config: ExperimentConfig, subnet: Subnet, low: int) -> float:
    model, data = config.model, config.data
    crops = [(2, data.global_crops.size), (data.local_crops.count, data.local_crops.size)]
    kept = 2 if config.engine.activation_checkpointing else _KEPT_PER_TOKEN
    total = 0.0
    for stage, depth in enumerate(subnet.depths):
        side = model.patch_size << (stage if model.family != "vit" else 0)
        width = subnet.width << (stage if model.family != "vit" else 0)
        tokens = sum(count * (size // side) ** 2 for count, size in crops)
        total += data.batch_size * tokens * width * depth * kept * low * (1 - model.drop_path)
    return total


def describe(config: ExperimentConfig) -> str:
    """The resolved config, the grid, and what one GPU holds: the text of `poa train --dry-run`."""
    model, largest = config.model, Grid(config.model).largest
    backbone, heads = cost.trained_params(config)
    step = cost.step_flops(config, Grid(model).smallest)
    memory = memory_estimate(config)
    lines = [
        dump_config(config).rstrip(),
        "",
        subnet_table(config),
        "",
        f"largest network {largest.name}: {backbone / 1e6:.1f} M parameters, heads {heads / 1e6:.1f} M",
        f"steps: {config.optim.total_steps}; per step and rank {config.data.batch_size} images, "
        f"{(step.teacher + step.intact) / 1e12:.2f} TFLOP and the elastic student's",
        f"memory of one rank alone: {sum(memory.values()) / _GIB:.1f} GiB",
        *(f"  {name:<28}{size / _GIB:>8.2f} GiB" for name, size in memory.items()),
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """The command, with the arguments of `pipeline.cli`."""
    if args.gpus < 1:
        raise UserError(f"{args.gpus} GPUs", "--gpus", "name one or more")
    if not 0 < args.mfu <= 1:
        raise UserError(f"a utilization of {args.mfu:g}", "--mfu", "name a share within (0, 1], such as 0.4")
    result = plan(load_config(args.config, args.overrides), args.gpus, args.gpu, args.mfu)
    print(json.dumps(result) if args.json else plan_text(result))
    return 0


def plan(config: ExperimentConfig, gpus: int, gpu: str, mfu: float) -> dict[str, Any]:
    """Everything that `poa plan` shows; FLOPs and bytes, per GPU and step unless the name says otherwise."""
    model, largest = config.model, Grid(config.model).largest
    card = forecast.GPUS[gpu]
    backbone, heads = cost.trained_params(config)
    waiting = forecast.stragglers(config, gpus)
    step = cost.step_flops(config, largest)
    flops = {"teacher": step.teacher, "intact": step.intact, "elastic_mean": waiting["shared"]["mean"]}
    stages = get_args(EngineConfig.model_fields["zero_stage"].annotation)
    memory = {str(stage): memory_estimate(config, gpus, stage) for stage in stages}
    return {
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "precision": config.engine.precision,
        "batch_size": config.data.batch_size,
        "parameters": {
            "backbone": backbone,
            "heads": heads,
            "smallest_subnet": cost.params(model, Grid(model).smallest),
        },
        "flops_per_step": flops | {"total": sum(flops.values())},
        "flops_per_image": {name: value / config.data.batch_size for name, value in flops.items()},
        "stragglers": waiting,
        "assignment": config.sampling.assignment,
        "memory": {
            stage: parts | {"total": sum(parts.values()), "fits": sum(parts.values()) <= card.memory}
            for stage, parts in memory.items()
        },
        "card_memory": card.memory,
        "host_memory": offloaded_bytes(config, gpus),
        "communication": {str(stage): forecast.communication(config, gpus, stage) for stage in stages},
        "speed": forecast.speed(config, gpus, card, mfu),
        "steps": config.optim.total_steps,
        "data": forecast.data(config, gpus),
        "checkpoint_bytes": 4 * forecast.VECTORS * (backbone + heads),
        "checkpoints_kept": config.run.keep,
    }


def plan_text(p: dict[str, Any]) -> str:
    """A plan as the tables that people read."""
    flops, speed, data, parameters = p["flops_per_step"], p["speed"], p["data"], p["parameters"]
    lines = [
        f"{p['gpus']} x {p['gpu']}, {p['batch_size']} images each, {p['precision']}, at {p['mfu']:.0%} of the peak "
        "(a guess unless you measured it)",
        "",
        f"parameters   backbone {parameters['backbone'] / 1e6:.1f} M, heads {parameters['heads'] / 1e6:.1f} M; "
        f"smallest sub-network {parameters['smallest_subnet'] / 1e6:.1f} M",
        f"TFLOP/step   {flops['total'] / 1e12:.2f} per GPU: "
        + ", ".join(f"{name} {flops[key] / 1e12:.2f} ({flops[key] / flops['total']:.1%})" for name, key in _BRANCHES),
        "GFLOP/image  " + ", ".join(f"{name} {p['flops_per_image'][key] / 1e9:.0f}" for name, key in _BRANCHES),
        f"speed        {speed['step_seconds']:.3f} s a step, {speed['images_per_second']:.0f} images/s "
        f"({speed['images_per_second_per_gpu']:.0f} per GPU)",
        f"the run      {p['steps']} steps: {speed['days']:.2f} days, {speed['gpu_hours']:.0f} GPU-hours",
        f"data         global batch {data['global_batch']}, peak lr {data['peak_lr']:.2e}, "
        f"{data['images_per_epoch']} images per epoch, {data['images_in_all'] / 1e6:.0f} M in all",
        f"shards       {data['shards']} for {p['gpus']} ranks (any rank reads any shard); {_passes(data)}",
        f"checkpoints  {p['checkpoint_bytes'] / _GIB:.2f} GiB each, {p['checkpoints_kept'] + 1} at most at a time: "
        f"{p['checkpoint_bytes'] * (p['checkpoints_kept'] + 1) / _GIB:.1f} GiB",
        "",
        "Waiting for the slowest rank (exact expectation, compute alone)",
        *(
            f"  {name:<12} elastic student {row['slowest'] / 1e12:6.2f} TFLOP instead of {row['mean'] / 1e12:.2f}: "
            f"step +{row['slowdown']:.1%}" + ("  <- sampling.assignment" if name == p["assignment"] else "")
            for name, row in p["stragglers"].items()
        ),
        "",
        f"GiB per GPU by ZeRO stage (the card has {p['card_memory'] / _GIB:.0f}; activations are an estimate)",
        *_columns(p["memory"], ("total", "fits")),
        *([f"  and in the host's memory {p['host_memory'] / _GIB:.2f} per GPU"] if p["host_memory"] else []),
        "",
        "GiB that a GPU sends per step by ZeRO stage (ring algorithms)",
        *_columns(p["communication"], ()),
    ]
    return "\n".join(lines)


_BRANCHES = (("teacher", "teacher"), ("intact", "intact"), ("elastic", "elastic_mean"))


def _passes(data: dict[str, Any]) -> str:
    if data["samples"] is None:
        return "not at hand or without index, so their samples are unknown"
    return (
        f"{data['samples']} samples, seen {data['passes_per_epoch']:.2f} times per epoch and "
        f"{data['passes_in_all']:.0f} times in all"
    )


def _columns(table: dict[str, dict[str, Any]], besides: tuple[str, ...]) -> list[str]:
    purposes = [name for name in next(iter(table.values())) if name not in besides]
    rows = [f"  {'':<28}" + "".join(f"{'stage ' + stage:>10}" for stage in table)]
    for name in purposes:
        rows.append(f"  {name:<28}" + "".join(f"{column[name] / _GIB:>10.2f}" for column in table.values()))
    total = [sum(column[name] for name in purposes) for column in table.values()]
    rows.append(f"  {'total':<28}" + "".join(f"{size / _GIB:>10.2f}" for size in total))
    if "fits" in besides:
        rows.append(f"  {'fits':<28}" + "".join(f"{'yes' if c['fits'] else 'NO':>10}" for c in table.values()))
    return rows
