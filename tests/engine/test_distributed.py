"""Devices of tasks, and what an error of a collective says."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.engine import distributed
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpus(monkeypatch):
    """A machine where this process sees so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)

    return see


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (7, 1, 0)])
def test_a_task_that_sees_one_gpu_uses_it_and_others_the_one_of_their_number(gpus, local_rank, visible, index):
    gpus(visible)
    assert distributed._device(local_rank) == (index, torch.device("cuda", index))


def test_a_task_beyond_several_gpus_has_none(gpus):
    gpus(4)
    with pytest.raises(UserError, match=r"local rank 4 has no GPU of its own \(4 visible\)"):
        distributed._device(4)


def test_ranks_that_share_a_gpu_are_refused(monkeypatch):
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    ranks = distributed.Ranks(1, 3, 1, torch.device("cuda", 0), None)  # type: ignore[arg-type]
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, own: [("elsewhere", "GPU-1"), own, own])
    with pytest.raises(UserError, match="ranks 1 and 2 share a GPU"):
        distributed._require_own_devices(ranks)
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, own: [(own[0], "GPU-2"), own, ("elsewhere", "GPU-1")])
    distributed._require_own_devices(ranks)


@pytest.mark.parametrize(
    ("ranks_here", "share"),
    [
        ([("n1", {0, 1}), ("n1", {2, 3}), ("n2", {0, 1})], 2),  # srun binds tasks
        ([("n1", {0, 1, 2, 3}), ("n1", {0, 1, 2, 3}), ("n2", {0, 1, 2, 3})], 2),  # torchrun does not
        ([("n1", {0})] * 4, 1),
    ],
)
def test_processors_are_shared_with_those_ranks_of_the_node_that_may_use_them_too(monkeypatch, ranks_here, share):
    monkeypatch.setattr("platform.node", lambda: "n1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: ranks_here[0][1])
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, own: ranks_here)
    assert distributed.Ranks(0, len(ranks_here), 0, torch.device("cpu"), None).cpu_share() == share  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected"), False),
        (dist.DistStoreError("wait timeout after 300000ms"), False),
        (ValueError("shape mismatch"), False),
    ],
)
def test_another_rank_is_lost_only_if_the_error_says_so(error, lost):
    assert distributed._lost_peer(error) is lost


@pytest.mark.runs
def test_the_traceback_is_shown_whatever_the_error_is_taken_for():
    script = """
import pipeline.engine.distributed as d, types
d._LOST_PEER_SECONDS = 0
def collective(): raise RuntimeError("Connection reset by peer")
with d.crash_together(types.SimpleNamespace(rank=1, world_size=2)):
    collective()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.index("error: rank 1 lost another rank: Connection reset by peer") < done.stderr.index(
        "in collective"
    )
