"""Which sub-network each rank trains at each step: a pure function of (seed, step, rank)."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from math import gcd

import numpy as np

from pipeline.elastic.subnet import Grid, Subnet

ASSIGNMENTS = ("balanced", "independent", "shared")


class SubnetSampler:
    """Shuffled cycles through the multiset of sub-networks; the full network is never drawn.

    With `n` entries and `R` ranks:

    * `shared`: one cycle of `n` steps for all ranks, every entry once.
    * `independent`: each rank has its own such cycle.
    * `balanced`: the entries sorted by cost are cut into groups of R neighbours, the groups are shuffled, and at each
      step the ranks share out one group. A cycle has n / gcd(n, R) steps and draws every entry R / gcd(n, R) times, so
      frequencies hold for any R: the sorted entries are walked up, down, up ..., which closes the last group with
      neighbours instead of joining the dearest entries to the cheapest.

    * `none`: there is no elastic student; nothing is drawn.

    Args:
        grid: sub-networks and their multiplicities.
        cost: what balanced groups are sorted by, such as the FLOPs of a sub-network.
        world_size: number of ranks.
        assignment: "balanced", "independent", "shared" or "none".
        seed: any non-negative integer.

    Raises:
        ValueError: unknown assignment.
    """

    def __init__(
        self, grid: Grid, cost: Callable[[Subnet], float], world_size: int, assignment: str = "balanced", seed: int = 0
    ):
        if assignment not in (*ASSIGNMENTS, "none"):
            raise ValueError(f"assignment: expected one of {', '.join(ASSIGNMENTS)}, none, got {assignment!r}")
        drawn = [subnet for subnet in grid.subnets if subnet != grid.largest] or [grid.largest]
        drawn.sort(key=lambda subnet: (cost(subnet), subnet))
        self.entries = tuple(subnet for subnet in drawn for _ in range(grid.multiplicity(subnet)))
        self.world_size = world_size
        self.assignment = assignment
        self.seed = seed
        self._permutation = lru_cache(maxsize=8)(self._draw_permutation)

    @property
    def cycle_steps(self) -> int:
        """Steps after which every entry has been drawn equally often."""
        n = len(self.entries)
        return n // gcd(n, self.world_size) if self.assignment == "balanced" else n

    def draw(self, step: int, rank: int) -> Subnet | None:
        """The sub-network of `rank` at `step`, if there is an elastic student."""
        if self.assignment == "none":
            return None
        cycle, position = divmod(step, self.cycle_steps)
        if self.assignment == "balanced":
            group = int(self._permutation("groups", cycle, self.cycle_steps)[position])
            member = int(self._permutation("members", step, self.world_size)[rank])
            return self._snake(group * self.world_size + member)
        stream = rank if self.assignment == "independent" else 0
        return self.entries[self._permutation(f"rank {stream}", cycle, len(self.entries))[position]]

    def counts(self, begin: int, end: int) -> Counter[Subnet]:
        """How often each sub-network is drawn in the steps from `begin` to before `end`, counted over the ranks."""
        found: Counter[Subnet] = Counter()
        if self.assignment == "none":
            return found
        first, last = (
            -(-begin // self.cycle_steps),
            end // self.cycle_steps,
        )  # whole cycles, of which every one is alike
        whole = range(first * self.cycle_steps, last * self.cycle_steps) if first < last else range(end, end)
        per_cycle = self.cycle_steps * self.world_size // len(self.entries)
        for subnet, entries in Counter(self.entries).items():
            found[subnet] = entries * per_cycle * max(last - first, 0)
        for step in (*range(begin, whole.start), *range(whole.stop, end)):
            found.update(drawn for rank in range(self.world_size) if (drawn := self.draw(step, rank)))
        return found

    def _snake(self, position: int) -> Subnet:
        lap, place = divmod(position, len(self.entries))
        return self.entries[-1 - place if lap % 2 else place]

    def _draw_permutation(self, purpose: str, number: int, size: int) -> np.ndarray:
        key = int.from_bytes(purpose.encode(), "little")
        sequence = np.random.SeedSequence([self.seed, key, number])
        return np.random.Generator(np.random.Philox(sequence)).permutation(size)
