"""What a config asks for, on paper: sub-networks, parameters, FLOPs, memory."""

from pipeline.config import ExperimentConfig, dump_config
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, Subnet

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
            f"{row['name']:>16}  {row['params'] / 1e6:>7.2f} M  {row['gflops']:>8.2f}  {drawn:>5}"
            + (f"  {alias[subnet]}" if subnet in alias else "")
        )
    entries = sum(row["multiplicity"] for row in subnet_rows(config))
    lines.append(f"{len(grid)} sub-networks, {entries} entries; `full` is the intact student, trained at every step")
    return "\n".join(lines)


def memory_estimate(config: ExperimentConfig, world_size: int = 1) -> dict[str, float]:
    """Bytes per GPU by purpose.

    Weights, gradients, optimizer state and logits follow from shapes; activations are an estimate for uncompiled ViT
    blocks (Swin and ResNet keep a similar multiple of their maps).
    """
    model, largest = config.model, Grid(config.model).largest
    low = 2 if config.engine.precision == "bf16" else 4
    sharded = config.engine.zero_stage >= 1 or config.engine.precision == "bf16"
    shard = world_size if sharded else 1
    count = cost.params(model, largest) + cost.head_params(config.heads, cost.feature_dim(model, largest))
    copies = 4 if sharded else 3  # ZeRO-0 trains the fp32 weights themselves: no master apart from them
    rows = config.data.batch_size * (2 * (1 + cost.masked_patches(config)) + config.data.local_crops.count)
    return {
        "weights (student, teacher)": 2.0 * low * count,
        "gradients": 1.0 * low * count,
        "fp32 master, AdamW, EMA": 4.0 * copies * count / shard,
        "activations (estimate)": _activations(config, largest, low),
        # student's logits with their gradient, the intact student's copy, and the teacher's
        "logits": 4.0 * low * rows * sum(config.heads.prototypes),
    }


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
    backbone = cost.params(model, largest)
    heads = cost.head_params(config.heads, cost.feature_dim(model, largest))
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
