"""Ranks, process groups and what they agree on."""

import os
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


_added_variables: list[str] = []


def _shared(error: Exception) -> Exception:
    if isinstance(error, UserError):
        error.shared = True
    return error


def initialize(timeout_seconds: float = 1800) -> Ranks:
    """Join the process group that torchrun or Slurm describes, or make one of this process alone.

    A RANK that is set (torchrun) wins over SLURM_PROCID. NCCL on GPUs, gloo without.

    Raises:
        UserError: the rank variables are incomplete.
    """
    environ = os.environ
    prefix = None
    if "RANK" in environ:
        prefix = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        prefix = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in prefix) if prefix else (0, 1, 0)
        if prefix:
            environ["MASTER_ADDR"], environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        fix = "launch with torchrun or a script of slurm/, which set it"
        raise UserError(f"{error} is missing or no number", "environment", fix) from error
    # DeepSpeed reads these even when the process group exists already
    _set_variables({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)})
    device = _device(local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if prefix:
            dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            _set_variables({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())})
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(rank, world_size, local_rank, device, control)


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
        if _lost_peer(error):
            time.sleep(_LOST_PEER_SECONDS)
            print(f"error: rank {ranks.rank} lost another rank: {error}", file=sys.stderr, flush=True)
        else:
            text = "".join(traceback.format_exception(error))
            print(f"error: rank {ranks.rank} of {ranks.world_size} crashed\n{text}", file=sys.stderr, flush=True)
        os._exit(1)


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended; gloo says so in words alone."""
    words = ("connection closed by peer", "connection reset", "broken pipe", "connection refused")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def shut_down() -> None:
    """Leave the process group, and the environment as it was: a later child is no rank of it."""
    if dist.is_initialized():
        deepspeed = sys.modules.get("deepspeed.comm.comm")  # it holds groups of its own, for the next engine too
        owner = deepspeed if deepspeed is not None and deepspeed.is_initialized() else dist
        owner.destroy_process_group()
    while _added_variables:
        os.environ.pop(_added_variables.pop(), None)


def _set_variables(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            _added_variables.append(name)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible)",
            "launch",
            "start one task per GPU",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
