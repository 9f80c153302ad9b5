"""A step's gradients on their way from the parameters to the ranks' shards, at ZeRO stages 0 to 2.

They travel in buckets while the backward pass that completes them goes on. Every rank sends every bucket, the last of
the flat vector first, which is the order of backward passes; a gradient that a rank's sub-network leaves out is zero.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.flight import Flight
from pipeline.engine.groups import Buckets
from pipeline.engine.sizes import AT_ONCE

# torch 2.14 renamed it
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Reduction:
    """Averages gradients over the ranks, each of which keeps its parts of the buckets.

    Autograd adds up the passes in the working precision. Where they are to be reduced in a wider one they are added up
    in that, too: after every pass they are moved there.

    Args:
        parameters: in the order of the flat vector; every rank has the same, and some may have no gradient.
        buckets: of the flat vector; where they have one owner, every rank gets all of them.
        dtype: to add them up in over passes and ranks.
        every_pass: reduce during every pass, so that no rank holds all gradients between two of them; else during the
            last, which sends half as much.
    """

    def __init__(self, parameters: Sequence[Tensor], buckets: Buckets, dtype: torch.dtype, every_pass: bool):
        self._parameters, self._buckets, self._dtype = parameters, buckets, dtype
        self._ranks = dist.get_world_size()
        self._every_pass = every_pass and self._ranks > 1
        self._widened = torch.promote_types(parameters[0].dtype, dtype) != parameters[0].dtype
        self._zero = parameters[0].new_zeros(1)
        starts = [0, *accumulate(p.numel() for p in parameters)]
        self._parts = [_within(starts, buckets.whole(bucket)) for bucket in range(len(buckets))]
        self._sending = False
        self._left = 0  # buckets that this pass has still to send: the first ones
        self._missing: list[int] = []  # by bucket, gradients that this pass has still to bring
        self._flight = Flight()
        self._sums: Tensor | None = None
        self._own: list[Tensor] = []
        if self._ranks > 1:
            for number, parameter in enumerate(parameters):
                places = [bucket for bucket, parts in enumerate(self._parts) if number in parts]
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, places))

    def before_pass(self, loss: Tensor, last: bool) -> None:
        """Prepare for the backward pass of a loss, the step's last or not."""
        self._sending = self._ranks > 1 and (last or self._every_pass)
        if not self._sending:
            return
        used = _leaves(loss)
        self._missing = [sum(id(self._parameters[n]) in used for n in parts) for parts in self._parts]
        self._left = len(self._buckets)
        self._own.append(self._zero.new_empty(self._buckets.share, dtype=self._dtype))
        self._send_complete()

    def after_pass(self) -> None:
        """Send what is left, or take what the backward pass left at the parameters, to be sent with the next one's."""
        if self._sending:
            self._missing = [0] * len(self._buckets)
            self._send_complete()
            self._sending = False
        elif self._widened:
            joined = self._joined(*range(len(self._buckets)))
            self._sums = joined.to(self._dtype) if self._sums is None else self._sums.add_(joined)

    def finish(self) -> None:
        """After the last pass, wait until all have arrived."""
        self._flight.land()
        if self._own:
            (own, *others), self._own = self._own, []
            for other in others:
                own.add_(other)
            self._own = [own.div_(self._ranks)]

    def gradients(self) -> list[Tensor]:
        """Of this rank's shard, one after the other."""
        if self._own:
            return self._own
        return [self._sums] if self._sums is not None else list(self._separate())

    def to(self, device: torch.device) -> None:
        """Move this rank's gradients, once they are complete, to where its shard is."""
        self._own = [torch.cat([gradient.view(-1) for gradient in self.gradients()]).to(device)]

    def forget(self) -> None:
        """End the step."""
        self._own, self._sums = [], None
        for parameter in self._parameters:
            parameter.grad = None

    def _arrived(self, places: Sequence[int], parameter: Tensor) -> None:
        """A gradient is complete."""
        if not self._sending:
            return
        if places[-1] >= self._left:
            raise RuntimeError("a gradient came after its bucket had been sent")
        for bucket in places:
            self._missing[bucket] -= 1
        self._send_complete()

    def _send_complete(self) -> None:
        while self._left and not self._missing[self._left - 1]:
            self._left -= 1
            self._send(self._left)

    def _send(self, bucket: int) -> None:
        whole = self._joined(bucket)
        if self._sums is not None:
            whole = self._sums[self._buckets.whole(bucket)].add_(whole)
        own = self._own[-1][self._buckets.local(bucket)]
        if self._buckets.ranks > 1:
            whole = whole.to(self._dtype)
            self._flight.add(_reduce_scatter(own, whole, async_op=True), whole)
        else:
            self._flight.add(dist.all_reduce(own.copy_(whole), async_op=True), own)
        if self._every_pass:
            self._flight.land(leaving=AT_ONCE)

    def _joined(self, *buckets: int) -> Tensor:
        """Gradients of neighbouring buckets, with padding, as one vector; they are taken from the parameters."""
        whole = slice(self._buckets.whole(buckets[0]).start, self._buckets.whole(buckets[-1]).stop)
        pieces = [self._gradient(n)[part] for b in buckets for n, part in self._parts[b].items()]
        padding = whole.stop - whole.start - sum(map(torch.Tensor.numel, pieces))
        joined = torch.cat([*pieces, self._zero.expand(padding)])
        for bucket in buckets:
            for number, part in self._parts[bucket].items():
                if part.start == 0:  # what precedes is sent later
                    self._parameters[number].grad = None
        return joined

    def _separate(self) -> Iterator[Tensor]:
        return map(self._gradient, range(len(self._parameters)))

    def _gradient(self, number: int) -> Tensor:
        parameter = self._parameters[number]
        return self._zero.expand(parameter.numel()) if parameter.grad is None else parameter.grad.reshape(-1)


def _within(starts: Sequence[int], place: slice) -> dict[int, slice]:
    """Which elements of vectors that follow one another lie in an interval, by their number."""
    found = {}
    for number, (start, stop) in enumerate(pairwise(starts)):
        low, high = max(start, place.start), min(stop, place.stop)
        if low < high:
            found[number] = slice(low - start, high - start)
    return found


def _leaves(loss: Tensor) -> set[int]:
    """By `id`, the parameters to which a backward pass brings a gradient."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found
