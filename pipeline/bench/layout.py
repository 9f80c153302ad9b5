"""Whether a network with convolutions is faster in channels_last."""

import statistics
from functools import partial
from typing import Any

import torch

from kernels.bench.clock import Clock
from pipeline.config import ExperimentConfig
from pipeline.elastic import build
from pipeline.engine.layouts import working_dtype
from pipeline.errors import UserError


def benchmark_layout(config: ExperimentConfig, repeats: int, warmup: int) -> dict[str, Any]:
    """Time the backbone's forward and backward pass over both groups of crops in NCHW and in channels_last by turns.

    Args:
        config: the experiment, of a family with convolutions; compiled as it says.
        repeats: measured passes of each layout.
        warmup: passes before them.

    Returns:
        For the smallest and the largest sub-network, median seconds in both layouts (on a CPU of processor time) and
        NCHW's time as a multiple of channels_last's.

    Raises:
        UserError: the family has no convolutions to lay out.
    """
    if config.model.family != "resnet":
        raise UserError(f"a {config.model.family} has one convolution", "model.family", "name the config of a resnet")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = config.data
    shapes = [(2 * data.batch_size, data.global_crops.size)]
    if data.local_crops.count:
        shapes.append((data.local_crops.count * data.batch_size, data.local_crops.size))

    def train(backbone: Any, crops: list[Any], subnet: Any) -> None:
        backbone.zero_grad()
        features = backbone.forward_crops(crops, subnet)
        sum(f.cls.square().mean() for f in features).backward()

    clock = Clock(device, repeats)
    layouts: dict[str, Any] = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        backbone = build(config.model).to(device, working_dtype(config.engine)).to(memory_format=layout)
        if config.engine.compile:
            backbone.compile_blocks()
        images = [torch.randn(n, config.model.in_chans, side, side, device=device) for n, side in shapes]
        layouts[name] = backbone, [x.to(working_dtype(config.engine), memory_format=layout) for x in images]
    result = {}
    for size in ("smallest", "largest"):
        taken: dict[str, list[float]] = {name: [] for name in layouts}
        for _ in range(warmup + repeats):
            for name, (backbone, crops) in layouts.items():
                subnet = getattr(backbone.grid, size)
                taken[name].append(clock.once_ms(partial(train, backbone, crops, subnet)) / 1e3)
        medians = {name: statistics.median(values[warmup:]) for name, values in taken.items()}
        ratio = medians["contiguous"] / medians["channels_last"]
        result[size] = {"seconds": medians, "channels_last_speedup": ratio}
    return result
