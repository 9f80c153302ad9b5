"""A step's gradients on their way from the parameters to the ranks' shards, at ZeRO stage 1 and 2."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed it
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Reduction:
    """Averages gradients over the ranks, each of which keeps the part of its shard.

    Autograd adds up the passes in the working precision. Where they are to be reduced in a wider one they are added up
    in that, too: after every pass they are moved there.

    Args:
        parameters: in the order of the flat vector; every rank has the same, and some may have no gradient.
        length: of the flat vector with its padding, a multiple of the number of ranks.
        dtype: to add them up in over passes and ranks.
        every_pass: reduce after every pass, so that no rank holds all gradients between two of them; else after the
            last, which sends half as much.
    """

    def __init__(self, parameters: Sequence[Tensor], length: int, dtype: torch.dtype, every_pass: bool):
        self._parameters, self._length, self._dtype = parameters, length, dtype
        self._every_pass = every_pass and dist.get_world_size() > 1
        self._widened = torch.promote_types(parameters[0].dtype, dtype) != parameters[0].dtype
        self._zero = parameters[0].new_zeros(1)
        self._whole: Tensor | None = None
        self._own: Tensor | None = None

    def after_pass(self, last: bool) -> None:
        """Take what a backward pass left at the parameters, but leave to `finish` what the last one sends."""
        if self._every_pass:
            if not last:
                self._scatter(self._joined())
        elif self._widened:
            joined = self._joined()
            self._whole = joined if self._whole is None else self._whole.add_(joined)

    def finish(self) -> None:
        """After the last pass, bring the gradients to the shards. Collective."""
        if dist.get_world_size() > 1:
            whole, self._whole = self._whole, None
            self._scatter(self._joined() if whole is None else whole)

    def gradients(self) -> list[Tensor]:
        """Of this rank's shard, one after the other."""
        if self._own is not None:
            return [self._own]
        return self._separate() if self._whole is None else [self._whole]

    def to(self, device: torch.device) -> None:
        """Move this rank's gradients, once they are complete, to where its shard is."""
        self._own = torch.cat([gradient.view(-1) for gradient in self.gradients()]).to(device)

    def forget(self) -> None:
        """End the step."""
        self._own = self._whole = None
        self._clear()

    def _separate(self) -> list[Tensor]:
        return [self._zero.expand(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self._parameters]

    def _joined(self) -> Tensor:
        """All gradients as one vector, taken from the parameters."""
        separate = self._separate()
        padding = self._length - sum(g.numel() for g in separate)
        joined = torch.cat([*separate, separate[0].new_zeros(padding)])
        self._clear()
        return joined.to(self._dtype)

    def _scatter(self, whole: Tensor) -> None:
        own = whole.new_empty(len(whole) // dist.get_world_size())
        _reduce_scatter(own, whole)
        own.div_(dist.get_world_size())
        self._own = own if self._own is None else self._own.add_(own)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
