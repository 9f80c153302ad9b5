"""`python -m pipeline.bench step|data|layout CONFIG`.

What a step costs by phase, what the data pipeline delivers, and whether a ResNet is faster in channels_last.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from typing import Any

from pipeline.config import ExperimentConfig, load_config
from pipeline.errors import UserError


def benchmark_step(config: ExperimentConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Time real training steps, on one rank or under torchrun.

    Args:
        config: the experiment; nothing is written.
        steps: measured steps.
        warmup: steps before them (compilation, first batches).

    Returns:
        Median and quartiles of the step in seconds, images per second, mean seconds by phase, FLOP/s.
    """
    from pipeline import distributed
    from pipeline.trainer import Trainer

    ranks = distributed.initialize()
    trainer = Trainer(config, ranks)
    trainer.start_data(0)
    for step in range(warmup):
        trainer.step(step)
    before = dict(trainer.phases.seconds)
    seconds, flops = [], 0.0
    for step in range(warmup, warmup + steps):
        began = time.perf_counter()
        report = trainer.step(step)  # ends with a value read from the device
        seconds.append(time.perf_counter() - began)
        flops += report.flops
    low, median, high = statistics.quantiles(seconds, n=4)
    result = {
        "images_per_second": trainer.global_batch / median,
        "step_seconds": {"quartile_1": low, "median": median, "quartile_3": high},
        "phase_seconds": {
            phase: (total - before[phase]) / steps for phase, total in trainer.phases.seconds.items() if total
        },
        "tflops_per_second_per_rank": flops / sum(seconds) / ranks.world_size / 1e12,
        "ranks": ranks.world_size,
        "global_batch": trainer.global_batch,
        "steps": steps,
    }
    trainer.close()
    distributed.shut_down()
    return result


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
    import torch

    from kernels.bench import Clock
    from pipeline.elastic import build
    from pipeline.engine.layouts import working_dtype

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
        backbone = build(config.model).to(device, working_dtype(config)).to(memory_format=layout)
        if config.engine.compile:
            backbone.compile_blocks()
        images = [torch.randn(n, config.model.in_chans, side, side, device=device) for n, side in shapes]
        layouts[name] = backbone, [x.to(working_dtype(config), memory_format=layout) for x in images]
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


def main() -> int:
    """Print one JSON object with the figures and what they were measured on."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("what", choices=("step", "data", "layout"))
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=20, help="to measure, or batches or passes (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before (default: %(default)s)")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.what == "data":
            from pipeline.data.bench import benchmark

            result = benchmark(config.data, device=device, batches=args.steps)
        elif args.what == "layout":
            result = benchmark_layout(config, args.steps, args.warmup)
        else:
            result = benchmark_step(config, args.steps, args.warmup)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"what": args.what, "config": args.config, **machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
