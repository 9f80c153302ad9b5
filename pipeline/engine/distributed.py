"""Ranks, process groups and what they agree on."""

import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d, rendezvous

from pipeline.engine import private
from pipeline.engine.interface import VARIABLE, choose_interface, require_master, require_named_interface
from pipeline.engine.launch import launch
from pipeline.errors import UserError

T = TypeVar("T")
_LOST_PEER_SECONDS = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and the device it trains on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group for objects and small host tensors, apart from the device's collectives."""

    def cpu_share(self) -> int:
        """Processors that this rank may use, or its part of those that it shares with others of its node. Collective.

        Launchers differ: srun may bind each task to its own, torchrun leaves all of them to all.
        """
        own = (platform.node(), os.sched_getaffinity(0))
        sharing = sum(host == own[0] and bool(cpus & own[1]) for host, cpus in self.gather(own))
        return max(len(own[1]) // sharing, 1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and give its result to every rank; its exception is raised on every rank."""
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [(make(), None)]
            except Exception as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, src=0, group=self.control)
        value, failure = box[0]
        if failure is not None:
            raise _shared(failure)
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value, group=self.control)
        return out

    def together(self, act: Callable[[], T]) -> list[T]:
        """Run `act` on every rank; the first rank's exception is raised on all, so that none waits for another."""
        try:
            outcome: tuple[Any, Exception | None] = (act(), None)
        except Exception as error:
            outcome = (None, error)
        outcomes = self.gather(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise _shared(failure)
        return [value for value, _ in outcomes]


_changed_variables: list[tuple[str, str | None]] = []


def _shared(error: Exception) -> Exception:
    if isinstance(error, UserError):
        error.shared = True
    return error


def initialize(timeout_seconds: float = 1800, collective_seconds: float | None = None) -> Ranks:
    """Join the process group that torchrun or Slurm describes, or make one of this process alone.

    NCCL on GPUs, gloo without.

    Args:
        timeout_seconds: how long to wait for the other ranks.
        collective_seconds: how long a collective may take; as long if None.

    Raises:
        UserError: the rank variables are incomplete, GLOO_SOCKET_IFNAME names no interface, MASTER_ADDR nothing, the
            ranks have not met in time, or share a GPU.
    """
    rank, world_size, local_rank, together = launch()
    index, device = _device(local_rank)
    # DeepSpeed reads these even when the process group exists already; its LOCAL_RANK is the number of a device
    _set_variables({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)})
    if index != local_rank:
        _set_variables({"LOCAL_RANK": str(index)}, instead=True)
    # NCCL's own watchdog takes a job that was suspended for one that hangs
    _set_variables({"TORCH_NCCL_ENABLE_MONITORING": "0"})
    timeout, long = timedelta(seconds=timeout_seconds), timedelta(seconds=collective_seconds or timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        store: dist.Store = dist.HashStore()
        if together:
            require_named_interface()
            master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            require_master(*master)
            store = _meet(rank, world_size, timeout)
            interface = choose_interface(dist.PrefixStore("interface", store), rank, world_size, master)
            _set_variables({VARIABLE: interface} if interface else {})
        else:
            _set_variables({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())})
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=long)
    control = dist.new_group(backend="gloo", timeout=long)
    assert isinstance(control, dist.ProcessGroup)
    ranks = Ranks(rank, world_size, local_rank, device, control)
    if device.type == "cuda":
        _require_own_devices(ranks)
    return ranks


def _meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        return store
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = f"rank {rank} of {world_size} has not met the others: {str(error).splitlines()[0]}"
        fix = "start all ranks, and look whether that address and port are the first node's and can be reached"
        raise UserError(what, where, fix) from error


def collectives_begun() -> int:
    """Collectives that this rank has begun so far, in all groups, as torch counts them; 0 where it does not tell."""
    try:
        groups = list(distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


@contextmanager
def crash_together(ranks: Ranks) -> Iterator[None]:
    """Let a crashed rank end at once, so that its launcher ends the others, with the first cause first in the log.

    Its traceback comes before any cleaning up, which might wait for the others. A rank that merely lost its peer gives
    the launcher some seconds to end it before it speaks.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ranks.world_size == 1:
            raise
        text = "".join(traceback.format_exception(error))
        if _lost_peer(error):
            time.sleep(_LOST_PEER_SECONDS)
            print(f"error: rank {ranks.rank} lost another rank: {error}\n{text}", file=sys.stderr, flush=True)
        else:
            print(f"error: rank {ranks.rank} of {ranks.world_size} crashed\n{text}", file=sys.stderr, flush=True)
        os._exit(1)


_LOST_PEER = (
    *("connection closed by peer", "connection reset", "broken pipe", "connection refused"),  # gloo
    *("remote process exited", "network error", "socket timeout", "connection closed by remote peer"),  # NCCL
)


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended; libraries say so in words alone."""
    return any(word in str(error).lower() for word in _LOST_PEER)


def shut_down() -> None:
    """Leave the process group, and the environment as it was: a later child is no rank of it."""
    if dist.is_initialized() and not private.leave_groups():
        dist.destroy_process_group()
    while _changed_variables:
        name, before = _changed_variables.pop()
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _set_variables(variables: dict[str, str], instead: bool = False) -> None:
    for name, value in variables.items():
        if instead or name not in os.environ:
            _changed_variables.append((name, os.environ.get(name)))
            os.environ[name] = value


def _device(local_rank: int) -> tuple[int, torch.device]:
    """The device of a task, and its number here. Where each task sees its own GPU alone, all of them are number 0."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return local_rank, torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own ({count} visible)", "launch", "start one task per GPU"
        )
    torch.cuda.set_device(index)
    return index, torch.device("cuda", index)


def _require_own_devices(ranks: Ranks) -> None:
    """Two ranks on one GPU would wait for each other in NCCL."""
    own = (platform.node(), str(torch.cuda.get_device_properties(ranks.device).uuid))
    devices = ranks.gather(own)
    if other := next((rank for rank, there in enumerate(devices) if there == own and rank != ranks.rank), None):
        first, second = sorted((ranks.rank, other))
        raise UserError(f"ranks {first} and {second} share a GPU of {own[0]}", "launch", "start one task per GPU")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
