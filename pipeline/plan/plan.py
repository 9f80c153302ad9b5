"""What a config asks for on N GPUs: parameters, FLOPs, memory, traffic, days, as one value and as text."""

from typing import Any

from pipeline.config import ExperimentConfig, dump_config
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid
from pipeline.plan import forecast
from pipeline.plan.memory import (
    OUTSIDE,
    RANKS_PER_NODE,
    checkpoint_bytes,
    host_bytes,
    memory_estimate,
    shard_ranks,
    under,
)
from pipeline.plan.subnets import subnet_table

_GIB = 1 << 30


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
        f"kernels: {config.kernels_text()}",
        f"steps: {config.optim.total_steps}; per step and rank {config.data.batch_size} images, "
        f"{(step.teacher + step.intact) / 1e12:.2f} TFLOP"
        + (" (no elastic student)" if config.sampling.alone else " and the elastic student's"),
        f"memory of one rank alone: {sum(memory.values()) / _GIB:.1f} GiB",
        *(f"  {name:<28}{size / _GIB:>8.2f} GiB" for name, size in memory.items()),
    ]
    return "\n".join(lines)


def plan(config: ExperimentConfig, gpus: int, gpu: str, mfu: float) -> dict[str, Any]:
    """Everything that `poa plan` shows; FLOPs and bytes, per GPU and step unless the name says otherwise."""
    model, largest = config.model, Grid(config.model).largest
    card = forecast.GPUS[gpu]
    backbone, heads = cost.trained_params(config)
    waiting = forecast.stragglers(config, gpus)
    step = cost.step_flops(config, largest)
    flops = {
        "teacher": step.teacher,
        "intact": step.intact,
        "elastic_mean": waiting[config.sampling.assignment]["mean"],
    }
    engines = {str(stage): under(config, zero_stage=stage) for stage in range(4)}
    engines |= {f"fsdp2 {word}": under(config, reshard_after_forward=reshard) for word, reshard in _FSDP2}
    outside = {"CUDA, NCCL, DALI (allowance)": float(OUTSIDE)}
    memory = {name: memory_estimate(each, gpus) | outside for name, each in engines.items()}
    return {
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "precision": config.engine.precision,
        "kernels": config.kernels_in_use(),
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
            name: parts | {"total": sum(parts.values()), "fits": sum(parts.values()) <= card.memory}
            for name, parts in memory.items()
        },
        "card_memory": card.memory,
        "peak_flops": card.peak(config.engine.precision),
        "host_memory": host_bytes(config, gpus),
        "communication": {name: forecast.communication(each, gpus) for name, each in engines.items()},
        "fsdp2_shard_ranks": shard_ranks(engines["fsdp2 keep"], gpus),
        "speed": forecast.speed(config, gpus, card, mfu),
        "steps": config.optim.total_steps,
        "data": forecast.data(config, gpus),
        "store": forecast.store(config, gpus),
        "checkpoint_bytes": checkpoint_bytes(config),
        "checkpoints_kept": config.run.keep,
    }


_FSDP2 = (("keep", False), ("reshard", True))
_WITHOUT_TF32 = {"fp32": " (TF32 is never switched on)"}


def plan_text(p: dict[str, Any]) -> str:
    """A plan as the tables that people read."""
    flops, speed, data, parameters = p["flops_per_step"], p["speed"], p["data"], p["parameters"]
    lines = [
        f"{p['gpus']} x {p['gpu']}, {p['batch_size']} images each, {p['precision']}, at {p['mfu']:.0%} (a guess unless "
        f"you measured it) of the peak, {p['peak_flops'] / 1e12:.0f} TFLOP/s{_WITHOUT_TF32.get(p['precision'], '')}",
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
        *_store(p["store"]),
        f"kernels      {', '.join(map(' '.join, p['kernels'].items()))}",
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
        f"GiB per GPU by ZeRO stage, and under FSDP2 in shards of {p['fsdp2_shard_ranks']} ranks, which keep or",
        f"reshard weights after a forward pass; the card has {p['card_memory'] / _GIB:.0f}, activations are estimated",
        *_columns(p["memory"], ("total", "fits")),
        "  and in the host's memory per GPU: "
        + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in p["host_memory"].items() if size),
        "",
        "GiB that a GPU sends per step (ring algorithms)",
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


def _title(engine: str) -> str:
    return f"stage {engine}" if engine.isdigit() else engine


def _store(store: dict[str, Any] | None) -> list[str]:
    if store is None:
        return []
    whole, single = store["share_in_pieces"], store["share_by_sample"]
    size = "" if store["bytes"] is None else f" ({store['bytes_per_node_and_epoch'] / 1e9:.3g} GB)"
    text = (
        f"store        {store['nodes']} nodes of {RANKS_PER_NODE} GPUs, {store['lanes']} lanes: in the first "
        f"epoch a node fetches {whole + single:.1%} of the set{size}; {single:.1%} one by one and in every epoch anew"
    )
    kept = f"; it keeps up to {store['cache_bytes'] / 1e9:.3g} GB in {store['cache_folder']}"
    return [text + (kept if store["cache_folder"] else " (no data.cache.folder)")]


def _columns(table: dict[str, dict[str, Any]], besides: tuple[str, ...]) -> list[str]:
    purposes = [name for name in next(iter(table.values())) if name not in besides]
    rows = [f"  {'':<28}" + "".join(f"{_title(name):>14}" for name in table)]
    for name in purposes:
        rows.append(f"  {name:<28}" + "".join(f"{column[name] / _GIB:>14.2f}" for column in table.values()))
    total = [sum(column[name] for name in purposes) for column in table.values()]
    rows.append(f"  {'total':<28}" + "".join(f"{size / _GIB:>14.2f}" for size in total))
    if "fits" in besides:
        rows.append(f"  {'fits':<28}" + "".join(f"{'yes' if c['fits'] else 'NO':>14}" for c in table.values()))
    return rows
