"""What a training step costs, by phase."""

import statistics
import time
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.engine import distributed
from pipeline.run.step import Trainer


def benchmark_step(config: ExperimentConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Time real training steps, on one rank or under torchrun.

    Args:
        config: the experiment; nothing is written.
        steps: measured steps.
        warmup: steps before them (compilation, first batches).

    Returns:
        Median and quartiles of the step in seconds, images per second, mean seconds by phase, FLOP/s.
    """
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
        flops += report.agreed.flops
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
