"""The two gloo ranks of test_sinkhorn.py, called with IMPL DIRECTORY; each writes DIRECTORY/RANK.pt."""

import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels.sinkhorn import sinkhorn


def be_rank(rank: int, impl: str, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    all_reduce, calls = dist.all_reduce, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return all_reduce(*arguments, **options)

    dist.all_reduce = counted
    generator = torch.Generator().manual_seed(rank)
    shapes = ((5, 3, 130), (4, 0, 64), (0, 0, 32))  # rows of either rank, prototypes
    logits = [torch.rand(shape[rank], shape[2], generator=generator) * 2 - 1 for shape in shapes]
    scalings = sinkhorn(logits, 0.06, impl=impl)
    torch.save({"logits": logits, "scalings": scalings, "all_reduces": len(calls)}, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "triton":
        importlib.import_module("torch._dynamo")  # the first call of an operator would, in either rank
    forks = multiprocessing.get_context("fork")  # which share the imports
    ranks = [forks.Process(target=be_rank, args=(rank, sys.argv[1], Path(sys.argv[2]))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
