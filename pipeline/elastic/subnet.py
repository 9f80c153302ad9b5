"""Sub-networks as values, and the grid of all that a run trains."""

import difflib
import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache, total_ordering
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError, short

if TYPE_CHECKING:
    from pipeline.config import ModelConfig

ALIASES = {
    "vit": {"small": "384x12", "base": "768x12", "large": "1024x24"},
    "eva": {"small": "384x12", "base": "768x12", "large": "1024x24"},
    "swin": {"tiny": "96x2.2.6.2", "small": "96x2.2.18.2", "base": "128x2.2.18.2"},
    "resnet": {"r50": "64x3.4.6.3", "r101": "64x3.4.23.3", "r152": "64x3.8.36.3"},
}


@total_ordering
@dataclass(frozen=True)
class Subnet:
    """One sub-network: a width in channels, the number of blocks of each stage, and how wide their MLPs are.

    Attributes:
        width: embedding channels (ViT), first-stage channels (Swin) or first-stage mid channels (ResNet).
        depths: kept blocks per stage; one stage for ViT.
        mlp_ratio: hidden units of an MLP per channel; None for the largest of the grid, which is the usual one.
    """

    width: int
    depths: tuple[int, ...]
    mlp_ratio: int | None = None

    @property
    def name(self) -> str:
        """Width x depths, e.g. `384x12` or `96x2.2.6.2`; with narrower MLPs `384x12m3`."""
        narrow = "" if self.mlp_ratio is None else f"m{self.mlp_ratio}"
        return f"{self.width}x{'.'.join(map(str, self.depths))}{narrow}"

    def __str__(self) -> str:
        return self.name

    def __lt__(self, other: "Subnet") -> bool:
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[int, tuple[int, ...], float]:
        return self.width, self.depths, math.inf if self.mlp_ratio is None else self.mlp_ratio


def mlp_ratio(config: "ModelConfig", subnet: Subnet) -> int:
    """Hidden units of an MLP of `subnet` per channel of its input."""
    return subnet.mlp_ratio or config.mlp_ratio.max


def largest_subnet(config: "ModelConfig") -> Subnet:
    """The full network: the intact student."""
    return Subnet(config.widths[-1], tuple(choices[-1] for choices in config.depth_ranges))


class Grid:
    """All sub-networks of a model, with the frequency at which training draws them.

    Args:
        config: family, widths and depths.
        small_bias: how much more often the smallest width (and depth) is drawn than the largest.
    """

    def __init__(self, config: "ModelConfig", small_bias: float = 1.0):
        self.family = config.family
        self.widths = config.widths
        self.depths = sorted(itertools.product(*config.depth_ranges), key=lambda depths: (sum(depths), depths))
        *narrow, self._largest_ratio = config.mlp_ratio.values()
        self.mlp_ratios: tuple[int | None, ...] = (*narrow, None)
        self.small_bias = small_bias

    @cached_property
    def subnets(self) -> tuple[Subnet, ...]:
        """Every sub-network, the full network included, by width, then by number of blocks, then by MLP ratio."""
        return tuple(map(Subnet, *zip(*itertools.product(self.widths, self.depths, self.mlp_ratios), strict=True)))

    def of_every_shape(self, depths: tuple[int, ...]) -> list[Subnet]:
        """A sub-network of every width and MLP ratio: what differs between the blocks of two sub-networks."""
        return [Subnet(width, depths, ratio) for width in self.widths for ratio in self.mlp_ratios]

    @property
    def smallest(self) -> Subnet:
        return self.subnets[0]

    @property
    def largest(self) -> Subnet:
        """The full network: the intact student."""
        return self.subnets[-1]

    @cached_property
    def _multiplicities(self) -> dict[Subnet, int]:
        by_width = np.linspace(self.small_bias, 1.0, len(self.widths))
        if self.family == "resnet":
            by_width = np.ones(len(self.widths))
        by_depth = np.linspace(self.small_bias, 1.0, len(self.depths))
        counts = np.round(np.outer(by_width, by_depth)).astype(int).repeat(len(self.mlp_ratios))
        return dict(zip(self.subnets, counts.ravel().tolist(), strict=True))

    def multiplicity(self, subnet: Subnet) -> int:
        """Entries of `subnet` in the sampling law; the full network has some too, but samplers leave it out.

        round(a b) with a falling linearly from `small_bias` to 1 over the widths and b likewise over the depths
        (depth tuples in the order of their sums); ResNet: over the depths only. Half rounds to even. The MLP
        ratios of a width and depth are drawn equally often.
        """
        return self._multiplicities[subnet]

    def __contains__(self, subnet: object) -> bool:
        return subnet in self._multiplicities

    def __len__(self) -> int:
        return len(self.subnets)

    @cached_property
    def aliases(self) -> dict[str, Subnet]:
        """The paper's names for those of its sizes that lie in this grid."""
        ratio = "" if self.family == "resnet" else "m4"
        named = {alias: self._read(name + ratio) for alias, name in ALIASES[self.family].items()}
        return {alias: subnet for alias, subnet in named.items() if subnet is not None and subnet in self}

    def parse(self, name: str) -> Subnet:
        """The sub-network called `name`: `384x12`, `384x12m3`, `96x2.2.6.2`, or an alias of the paper's sizes.

        Raises:
            UserError: it is not in the grid; the message names the nearest ones.
        """
        subnet = self.aliases.get(name) or self._read(name)
        if subnet is not None and subnet in self:
            return subnet
        raise UserError(
            f"no sub-network {short(name)}", "subnet", f"nearest in the grid: {', '.join(self._nearest(name))}"
        )

    def _nearest(self, name: str) -> list[str]:
        wanted = self._read(name)
        if wanted is None or len(wanted.depths) != len(self.depths[0]):
            names = [*self.aliases, *(subnet.name for subnet in self.subnets)]
            return difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        step = max(self.widths[0], 1)

        def distance(subnet: Subnet) -> float:
            blocks = sum(abs(a - b) for a, b in zip(subnet.depths, wanted.depths, strict=True))
            ratio = abs((subnet.mlp_ratio or self._largest_ratio) - (wanted.mlp_ratio or self._largest_ratio))
            return abs(subnet.width - wanted.width) / step + blocks / max(sum(self.depths[-1]), 1) + ratio

        return [subnet.name for subnet in sorted(self.subnets, key=distance)[:3]]

    def _read(self, name: str) -> Subnet | None:
        match = re.fullmatch(r"(\d{1,9})x(\d{1,9}(?:\.\d{1,9})*)(?:m(\d{1,9}))?", name, re.ASCII)
        if match is None:
            return None
        ratio = None if match[3] is None or int(match[3]) == self._largest_ratio else int(match[3])
        return Subnet(int(match[1]), tuple(int(depth) for depth in match[2].split(".")), ratio)


def kept(config: "ModelConfig", subnet: Subnet) -> tuple[tuple[int, ...], ...]:
    """Indices of the blocks that a sub-network has of each stage: the most important ones, or evenly spread ones."""
    by_parity = config.family == "swin"
    full = largest_subnet(config).depths
    if config.block_importance is None:
        even = kept_blocks_by_parity if by_parity else kept_blocks
        return tuple(even(depth, blocks) for depth, blocks in zip(subnet.depths, full, strict=True))
    pairs = zip(subnet.depths, config.block_importance, strict=True)
    return tuple(most_important(depth, tuple(scores), by_parity) for depth, scores in pairs)


@lru_cache(maxsize=1024)
def most_important(depth: int, scores: tuple[float, ...], by_parity: bool = False) -> tuple[int, ...]:
    """Rising indices of `depth` blocks with the largest sum of scores.

    Args:
        depth: how many.
        scores: of all blocks.
        by_parity: as `kept_blocks_by_parity` has it, block j is an even one if j is even, an odd one if j is odd.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}  # of those chosen so far, by the last one
    for j in range(depth):
        chosen, best = best, {}
        for block in range(j, len(scores) - (depth - 1 - j)):
            if not by_parity or block % 2 == j % 2:
                total, blocks = max((entry for last, entry in chosen.items() if last < block), key=lambda e: e[0])
                best[block] = total + scores[block], (*blocks, block)
    return max(best.values(), key=lambda entry: entry[0])[1]


def kept_blocks(depth: int, full_depth: int) -> tuple[int, ...]:
    """Indices of the blocks that a stage of `depth` keeps out of `full_depth`, evenly spread from first to last."""
    return tuple(np.linspace(0, full_depth - 1, depth).astype(int).tolist())


def kept_blocks_by_parity(depth: int, full_depth: int) -> tuple[int, ...]:
    """Like `kept_blocks`, but block j of the sub-network is an even block if j is even, an odd one if j is odd.

    Window shift in Swin alternates with the index of a block; so it alternates in the same way in the sub-network
    as trained and in the model extracted from it. Every index is j plus an even number, the nearest to an even spread.
    """
    ideal = np.linspace(0, full_depth - 1, depth)
    j = np.arange(depth)
    pairs = np.minimum(np.floor((ideal - j) / 2 + 0.5), (full_depth - depth) // 2).astype(int)
    return tuple((j + 2 * pairs).tolist())
