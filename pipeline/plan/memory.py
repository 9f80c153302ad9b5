"""What a rank holds, by purpose, from shapes alone."""

from pipeline.config import ExperimentConfig
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, Subnet
from pipeline.engine.sizes import BUCKET

OUTSIDE = 3 << 30
"""Bytes of a GPU left to what torch does not know of: CUDA's context and kernels, NCCL's and DALI's buffers. It is an
allowance, not measured: `poa_device_memory_bytes{kind="outside"}` of a run says what it is there."""

# Activations that the backward pass of one block keeps per token, in multiples of its width: input of both norms, qkv,
# attention output, both sides of the 4x MLP, and the two residual sums. Counted from the operations of a ViT block.
_KEPT_PER_TOKEN = 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4 + 1


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
        "gathered weights (estimate)": 1.0 * low * block,  # one at a time
        "gradients": _gradient_bytes(config, stage, count, world_size, bucket),
        "fp32 master, AdamW, EMA": 0.0 if config.engine.offload_optimizer else state_bytes(config, world_size, stage),
        "activations (estimate)": _activations(config, largest, low),
        # student's logits with their gradient, the teacher's, and the intact student's copy for the elastic one
        "logits": (3.0 if config.sampling.alone else 4.0) * low * rows * sum(config.heads.prototypes),
    }


def _gradient_bytes(config: ExperimentConfig, stage: int, count: int, world_size: int, bucket: int) -> float:
    """Of a backward pass in the working precision, and of the passes before it in the one they are added up in."""
    low = 2 if config.engine.precision == "bf16" else 4
    summed = max(low, 2 if config.engine.reduce_dtype == "bf16" else 4)
    if stage == 3:
        return 1.0 * summed * count / world_size + low * bucket
    if stage == 2 and world_size > 1:
        return 1.0 * low * count + summed * count / world_size
    return 1.0 * low * count + (summed * count if summed > low else 0)


def state_bytes(config: ExperimentConfig, world_size: int, stage: int) -> float:
    """Bytes of a rank's fp32 masters, moments and EMA, on the GPU or, offloaded, in the host's memory."""
    count = cost.trained_params(config).total
    # ZeRO-0 trains the fp32 weights themselves, and their average is the teacher: moments are left
    return 4.0 * 2 * count if stage == 0 else 4.0 * 4 * count / world_size


def host_bytes(config: ExperimentConfig, world_size: int) -> dict[str, float]:
    """Bytes of a rank in the host's memory by purpose.

    torch rounds a pinned buffer up to a power of two, which the snapshot's does not count.
    """
    state = state_bytes(config, world_size, config.engine.effective_stage())
    return {
        "offloaded state": state if config.engine.offload_optimizer else 0.0,
        "snapshot of a checkpoint": checkpoint_bytes(config) / world_size,
    }


def checkpoint_bytes(config: ExperimentConfig) -> int:
    """Of all its shards together: fp32 weights, EMA, and AdamW's two moments."""
    return 4 * 4 * cost.trained_params(config).total


def _activations(config: ExperimentConfig, subnet: Subnet, low: int) -> float:
    model, data = config.model, config.data
    crops = [(2, data.global_crops.size), (data.local_crops.count, data.local_crops.size)]
    kept = 2 if config.engine.activation_checkpointing else _KEPT_PER_TOKEN
    total = 0.0
    for stage, depth in enumerate(subnet.depths):
        side = model.patch_size << (0 if model.one_stage else stage)
        width = subnet.width << (0 if model.one_stage else stage)
        tokens = sum(count * (size // side) ** 2 for count, size in crops)
        total += data.batch_size * tokens * width * depth * kept * low * (1 - model.drop_path)
    return total
