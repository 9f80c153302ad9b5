"""`python -m pipeline.bench step|data CONFIG`: what a step costs by phase, and what the data pipeline delivers."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
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


def main() -> int:
    """Print one JSON object with the figures and what they were measured on."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("what", choices=("step", "data"))
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=20, help="steps or batches to measure (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before (default: %(default)s)")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.what == "data":
            from pipeline.data.bench import benchmark

            result = benchmark(config.data, device=device, batches=args.steps)
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
