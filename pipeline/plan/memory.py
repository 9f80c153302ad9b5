"""What a rank holds, by purpose, from shapes alone."""

from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, Subnet
from pipeline.engine.sizes import BUCKET, gradient_bytes

OUTSIDE = 3 << 30
"""Bytes of a GPU left to what torch does not know of: CUDA's context and kernels, NCCL's and DALI's buffers. It is an
allowance, not measured: `poa_device_memory_bytes{kind="outside"}` of a run says what it is there."""

RANKS_PER_NODE = 8
"""Of a node, as the job scripts start them, where nobody says how many GPUs it has."""

# Activations that the backward pass of one block keeps per token, in multiples of its width: input of both norms, qkv,
# attention output, and the two residual sums; both sides of the MLP, whose width is a multiple, are added. Counted from
# the operations of a ViT block.
_KEPT_PER_TOKEN = 1 + 1 + 3 + 1 + 1 + 1 + 1


def under(config: ExperimentConfig, **engine: Any) -> ExperimentConfig:
    """The same experiment by another engine.

    Args:
        config: the experiment.
        engine: `zero_stage` of DeepSpeed, or `reshard_after_forward` of FSDP2, in shards as the experiment has them.
    """
    own = config.engine
    if "zero_stage" in engine:
        engine |= {"backend": "deepspeed", "shard_size": None, "reshard_after_forward": None}
    else:
        engine |= {
            "backend": "fsdp2",
            "zero_stage": None,
            "offload_optimizer": None,
            "shard_size": own.shard_size or "all",
        }
    return config.model_copy(update={"engine": own.model_copy(update=engine)})


def shard_ranks(config: ExperimentConfig, world_size: int) -> int:
    """Ranks that share a copy of the state under FSDP2."""
    return {"all": world_size, "one": 1, "node": min(world_size, RANKS_PER_NODE)}[str(config.engine.shard_size)]


def memory_estimate(config: ExperimentConfig, world_size: int = 1, stage: int | None = None) -> dict[str, float]:
    """Bytes per GPU by purpose, by the config's engine, or at a ZeRO stage.

    Weights, gradients, optimizer state and logits follow from shapes; activations are an estimate for uncompiled ViT
    blocks (Swin and ResNet keep a similar multiple of their maps).
    """
    config = config if stage is None else under(config, zero_stage=stage)
    low = 2 if config.engine.precision == "bf16" else 4
    rows = config.data.batch_size * (2 * (1 + cost.masked_patches(config)) + config.data.local_crops.count)
    engine = _fsdp2(config, world_size) if config.engine.backend == "fsdp2" else _deepspeed(config, world_size)
    return {
        **engine,
        **_anchor(config, low),
        "activations (estimate)": _activations(config, Grid(config.model).largest, low),
        # student's logits with their gradient, the teacher's, and the intact student's copy for the elastic one
        "logits": (3.0 if config.sampling.alone else 4.0) * low * rows * sum(config.heads.prototypes),
    }


def _deepspeed(config: ExperimentConfig, world_size: int) -> dict[str, float]:
    low = 2 if config.engine.precision == "bf16" else 4
    stage, count = config.engine.effective_stage(), cost.trained_params(config).total
    shards = world_size if stage == 3 else 1
    block = cost.largest_block_params(config.model) if stage == 3 else 0
    rounded = low == 2 and stage < 3 and world_size > 1 and not config.engine.offload_optimizer  # before it is gathered
    return {
        "weights (student, teacher)": 2.0 * low * count * (1 / shards + rounded / world_size),
        "gathered weights (estimate)": 1.0 * low * block,  # one at a time
        "gradients": _gradients(config, stage, count, world_size, min(block, BUCKET)),
        "fp32 master, AdamW, EMA": 0.0 if config.engine.offload_optimizer else state_bytes(config, world_size),
    }


def _fsdp2(config: ExperimentConfig, world_size: int) -> dict[str, float]:
    """Masters and EMA are what is gathered, so there are no weights beside them."""
    low, summed = 2 if config.engine.precision == "bf16" else 4, 2 if config.engine.reduce_dtype == "bf16" else 4
    count, unit = cost.trained_params(config).total, _largest_unit(config)
    own = 4.0 * count / shard_ranks(config, world_size)
    at_once = 2.0 * low * unit  # a unit as it arrives and as it is used; on a GPU the next one is under way
    if config.engine.reshards(count):
        gathered, gradients = 2 * at_once, own + (low + summed) * unit
    else:
        gathered, gradients = low * count + at_once, summed * count + (low if summed > low else 0) * unit
    return {
        "weights (student, teacher)": 0.0,
        "gathered weights (estimate)": gathered,
        "gradients": gradients,
        "fp32 master, AdamW, EMA": state_bytes(config, world_size),
    }


def _largest_unit(config: ExperimentConfig) -> int:
    """Parameters of the largest block or head, which FSDP2 gathers as one."""
    largest = config.heads.model_copy(update={"prototypes": [max(config.heads.prototypes)]})
    head = cost.head_params(largest, cost.feature_dim(config.model, Grid(config.model).largest))
    return max(cost.largest_block_params(config.model), head)


def _anchor(config: ExperimentConfig, low: int) -> dict[str, float]:
    if not config.loss.anchor_weight:
        return {}
    return {"frozen network of the anchor": 1.0 * low * cost.trained_params(config).backbone}


def _gradients(config: ExperimentConfig, stage: int, count: int, world_size: int, bucket: int) -> float:
    """Of both backward passes, in the precisions in which they are made and added up."""
    low, reduced = 2 if config.engine.precision == "bf16" else 4, 2 if config.engine.reduce_dtype == "bf16" else 4
    if stage == 3:
        return 1.0 * max(low, reduced) * count / world_size + low * bucket
    return gradient_bytes(count, world_size, stage, low, reduced, 1 if config.sampling.alone else 2)


def state_bytes(config: ExperimentConfig, world_size: int) -> float:
    """Bytes of a rank's fp32 masters, moments and EMA, on the GPU or, offloaded, in the host's memory."""
    count = cost.trained_params(config).total
    if config.engine.backend == "fsdp2":
        return 4.0 * 4 * count / shard_ranks(config, world_size)
    # ZeRO-0 trains the fp32 weights themselves, and their average is the teacher: moments are left
    return 4.0 * 2 * count if config.engine.effective_stage() == 0 else 4.0 * 4 * count / world_size


def host_bytes(config: ExperimentConfig, world_size: int) -> dict[str, float]:
    """Bytes of a rank in the host's memory by purpose.

    torch rounds a pinned buffer up to a power of two, which the snapshot's does not count.
    """
    return {
        "offloaded state": state_bytes(config, world_size) if config.engine.offload_optimizer else 0.0,
        "snapshot of a checkpoint": checkpoint_bytes(config) / world_size,
    }


def checkpoint_bytes(config: ExperimentConfig) -> int:
    """Of all its shards together: fp32 weights, EMA, and AdamW's two moments."""
    return 4 * 4 * cost.trained_params(config).total


def _activations(config: ExperimentConfig, subnet: Subnet, low: int) -> float:
    model, data = config.model, config.data
    crops = [(2, data.global_crops.size), (data.local_crops.count, data.local_crops.size)]
    kept = 2 if config.engine.activation_checkpointing else _KEPT_PER_TOKEN + 2 * model.mlp_ratio.max
    total = 0.0
    for stage, depth in enumerate(subnet.depths):
        side = model.patch_size << (0 if model.one_stage else stage)
        width = subnet.width << (0 if model.one_stage else stage)
        tokens = sum(count * (size // side) ** 2 for count, size in crops)
        total += data.batch_size * tokens * width * depth * kept * low * (1 - model.drop_path)
    return total
