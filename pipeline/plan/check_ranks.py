"""Do the ranks at hand work together: kernels on each, clocks, collectives?"""

import os
import platform
import time

import torch
import torch.distributed as dist

from kernels.dispatch import interpreted
from kernels.distillation import column_sum
from pipeline.config import ExperimentConfig
from pipeline.engine.distributed import Ranks
from pipeline.engine.interface import VARIABLE
from pipeline.plan.check import Check

_PROBE_BYTES = 32 << 20
_SKEW_SECONDS = 2.0


def check_kernels(config: ExperimentConfig, ranks: Ranks) -> Check:
    """Do a kernel and, if it is on, `torch.compile` run on every rank? Both build with a C compiler at first use."""
    if config.uses_triton() and not torch.cuda.is_available() and not interpreted():
        return Check("kernels", "warn", "not tried: no GPU here", "run this on a compute node")
    failures = [failure for failure in ranks.gather(_kernel_failure(config, ranks.device)) if failure]
    finding = config.kernels_text() + (", torch.compile" if config.engine.compile else "")
    if failures:
        fix = "install gcc, g++ and Python's headers on every node, or set engine.kernels=eager engine.compile=false"
        return Check("kernels", "fail", f"{finding}: fails on {len(failures)} ranks, first {failures[0]}", fix)
    return Check("kernels", "pass", f"{finding} on {ranks.world_size} ranks")


def _kernel_failure(config: ExperimentConfig, device: torch.device) -> str | None:
    """Host and error if the smallest use fails."""
    try:
        impl = "triton" if config.uses_triton() else "eager"
        sums = column_sum(torch.full((2, 16), 0.25, device=device), impl=impl)
        if config.engine.compile:
            sums = torch.compile(lambda x: x * x + 0.25)(sums)
        found = sums.tolist()
    except Exception as error:  # of a compiler, of the driver, of the loader
        return _told(error)
    return None if found == [0.5] * 16 else f"{platform.node()}: a wrong result"


def check_clocks(ranks: Ranks) -> Check:
    """Do the nodes agree about the time? Heartbeats of different nodes are compared by it."""
    dist.barrier(group=ranks.control)
    times = ranks.gather(time.time())
    skew = max(times) - min(times)
    finding = f"{len(times)} ranks within {skew:.2f} s"
    if skew > _SKEW_SECONDS:
        return Check("clocks", "warn", finding, "start NTP on the nodes: the rank that hangs would be misjudged")
    return Check("clocks", "pass", finding)


def check_network(ranks: Ranks) -> Check:
    """By which interface do ranks of different nodes meet?"""
    rows = ranks.gather((platform.node(), os.environ.get(VARIABLE)))
    nodes = dict(rows)
    if len(nodes) == 1:
        return Check("network", "pass", "all ranks at hand are on one node")
    if unknown := [node for node, name in nodes.items() if name is None]:
        fix = f"set {VARIABLE} to the interface by which the nodes reach each other"
        return Check("network", "warn", f"{len(nodes)} nodes; {unknown[0]} has no interface of its own address", fix)
    names = ", ".join(sorted(set(map(str, nodes.values()))))
    return Check("network", "pass", f"{len(nodes)} nodes, gloo over {names}")


def check_collectives(ranks: Ranks, world_size: int) -> Check:
    """Does an all-reduce over the ranks at hand give the right sum, and how fast?"""
    seconds, failure = _reduce(ranks)
    finding = f"{ranks.world_size} ranks at hand ({dist.get_backend()}), {_PROBE_BYTES >> 20} MiB in {seconds:.3f} s"
    if failures := [text for text in ranks.gather(failure) if text]:
        finding += f": {len(failures)} ranks, first {failures[0]}"
        return Check("all-reduce", "fail", finding, "check the network and its driver")
    if ranks.world_size < world_size:
        return Check("all-reduce", "pass", finding, f"run this under srun or torchrun to try all {world_size}")
    return Check("all-reduce", "pass", finding)


def _reduce(ranks: Ranks) -> tuple[float, str | None]:
    """How long an all-reduce takes, and what this rank has against it; collective."""
    began = time.perf_counter()
    try:
        value = torch.full((_PROBE_BYTES // 4,), float(ranks.rank + 1), device=ranks.device)
        dist.all_reduce(value.clone())  # connections are made at the first
        began = time.perf_counter()
        dist.all_reduce(value)
        right = bool((value == ranks.world_size * (ranks.world_size + 1) / 2).all())
    except Exception as error:  # of NCCL, of the driver, of gloo
        return time.perf_counter() - began, _told(error)
    return time.perf_counter() - began, None if right else f"{platform.node()}: a wrong sum"


def _told(error: Exception) -> str:
    return f"{platform.node()}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
