"""A rank's part of a checkpoint, copied to the host's memory so that training goes on while it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import Piece
from pipeline.engine.layouts import Replica
from pipeline.engine.saved import CENTER
from pipeline.method.losses import Centering


@dataclass(frozen=True)
class Taken:
    """A snapshot: tensors by the names that they have in the file; whole once `wait` returns."""

    tensors: dict[str, Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the device has copied; lets other threads run."""
        if self.event is not None:
            self.event.synchronize()


class Snapshot:
    """Buffers in the host's memory, kept from one snapshot to the next; pinned where there is a GPU.

    Pinned ones are filled by the device itself, behind the step that it still computes and before the next one.

    Args:
        ranks: this process and its peers, which share out what each of them has.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, engine: Engine, centering: Centering) -> Taken:
        """Copy this rank's pieces; what an earlier call gave out is overwritten."""
        tensors: dict[str, Tensor] = {}
        for index, group in enumerate(engine.groups):
            pieces = own_pieces(group.pieces, engine.replica)
            places = torch.tensor([(p.start, p.length) for p in pieces], dtype=torch.int64).reshape(-1, 2)
            tensors[f"{index}.pieces"] = places
            for key, vector in {"master": group.master, "ema": group.ema, **engine.moments(group)}.items():
                name = f"{index}.{key}"
                tensors[name] = self._copy(name, [vector[p.here] for p in pieces])
        if self.ranks.is_main:
            for kind, heads in centering.center.items():
                for h, center in enumerate(heads):
                    name = f"{CENTER}{kind}.{h}"
                    tensors[name] = self._copy(name, [center])
        event = None
        if engine.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
        return Taken(tensors, event)

    def _copy(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """One contiguous vector on the host; a device never holds a second copy of it."""
        length = sum(map(len, parts))
        buffer = self._buffers.get(name)
        if buffer is None:
            pinned, dtype = any(part.is_cuda for part in parts), parts[0].dtype if parts else torch.float32
            buffer = self._buffers[name] = torch.empty(length, dtype=dtype, pin_memory=pinned)
        start = 0
        for part in parts:
            buffer[start : start + len(part)].copy_(part, non_blocking=True)
            start += len(part)
        return buffer


def own_pieces(pieces: Sequence[Piece], replica: Replica) -> list[Piece]:
    """What a rank saves of its shard: all, or an equal share of what others hold, too."""
    share = -(-sum(piece.length for piece in pieces) // replica.total)
    first, last = replica.number * share, (replica.number + 1) * share
    out, begin = [], 0
    for local, start, length in pieces:
        low, high = max(first - begin, 0), min(last - begin, length)
        begin += length
        if low < high:
            out.append(Piece(local + low, start + low, high - low))
    return out
