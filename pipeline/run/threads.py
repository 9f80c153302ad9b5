"""How many threads compute a step on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import ExperimentConfig
from pipeline.elastic import Grid, cost

FLOPS_PER_THREAD = 1e9
"""Of a block's forward pass: tens of milliseconds over some ten operations, each of which ends with a barrier."""


def fitting_threads(config: ExperimentConfig, cores: int) -> int:
    """Threads that the largest network's blocks keep busy, at least one.

    Threads wait for each other, spinning, at the end of every operation. Over small matrices they wait longer than they
    compute, and on a machine that other work loads a thread that is not running holds up all the others.

    Args:
        config: the experiment; a rank's batch decides.
        cores: that this process may use.
    """
    largest = Grid(config.model).largest
    forward = cost.step_flops(config, largest).intact / 3  # a backward pass is two forward passes
    return max(1, min(cores, int(forward / sum(largest.depths) / FLOPS_PER_THREAD)))


@contextmanager
def threads_that_fit(config: ExperimentConfig, device: torch.device) -> Iterator[None]:
    """Compute with `fitting_threads` on a CPU, unless OMP_NUM_THREADS says how many."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(fitting_threads(config, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
