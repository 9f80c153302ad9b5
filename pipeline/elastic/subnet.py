"""Sub-networks as values, and the grid of all that a run trains."""

import difflib
import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import ModelConfig

ALIASES = {
    "vit": {"small": "384x12", "base": "768x12", "large": "1024x24"},
    "eva": {"small": "384x12", "base": "768x12", "large": "1024x24"},
    "swin": {"tiny": "96x2.2.6.2", "small": "96x2.2.18.2", "base": "128x2.2.18.2"},
    "resnet": {"r50": "64x3.4.6.3", "r101": "64x3.4.23.3", "r152": "64x3.8.36.3"},
}


@dataclass(frozen=True, order=True)
class Subnet:
    """One sub-network: a width in channels and the number of blocks of each stage.

    Attributes:
        width: embedding channels (ViT), first-stage channels (Swin) or first-stage mid channels (ResNet).
        depths: kept blocks per stage; one stage for ViT.
    """

    width: int
    depths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Width x depths, e.g. `384x12` or `96x2.2.6.2`."""
        return f"{self.width}x{'.'.join(map(str, self.depths))}"

    def __str__(self) -> str:
        return self.name


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
        self.small_bias = small_bias

    @cached_property
    def subnets(self) -> tuple[Subnet, ...]:
        """Every sub-network, the full network included, by width and then by number of blocks."""
        return tuple(Subnet(width, depths) for width in self.widths for depths in self.depths)

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
        counts = np.round(np.outer(by_width, by_depth)).astype(int)
        return dict(zip(self.subnets, counts.ravel().tolist(), strict=True))

    def multiplicity(self, subnet: Subnet) -> int:
        """Entries of `subnet` in the sampling law; the full network has some too, but samplers leave it out.

        round(a b) with a falling linearly from `small_bias` to 1 over the widths and b likewise over the depths
        (depth tuples in the order of their sums); ResNet: over the depths only. Half rounds to even.
        """
        return self._multiplicities[subnet]

    def __contains__(self, subnet: object) -> bool:
        return subnet in self._multiplicities

    def __len__(self) -> int:
        return len(self.subnets)

    @cached_property
    def aliases(self) -> dict[str, Subnet]:
        """The paper's names for those of its sizes that lie in this grid."""
        named = {alias: _read(name) for alias, name in ALIASES[self.family].items()}
        return {alias: subnet for alias, subnet in named.items() if subnet is not None and subnet in self}

    def parse(self, name: str) -> Subnet:
        """The sub-network called `name`: `384x12`, `96x2.2.6.2`, or an alias of the paper's sizes.

        Raises:
            UserError: it is not in the grid; the message names the nearest ones.
        """
        subnet = self.aliases.get(name) or _read(name)
        if subnet is not None and subnet in self:
            return subnet
        raise UserError(f"no sub-network {name!r}", "subnet", f"nearest in the grid: {', '.join(self._nearest(name))}")

    def _nearest(self, name: str) -> list[str]:
        wanted = _read(name)
        if wanted is None or len(wanted.depths) != len(self.depths[0]):
            names = [*self.aliases, *(subnet.name for subnet in self.subnets)]
            return difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        step = max(self.widths[0], 1)

        def distance(subnet: Subnet) -> float:
            blocks = sum(abs(a - b) for a, b in zip(subnet.depths, wanted.depths, strict=True))
            return abs(subnet.width - wanted.width) / step + blocks / max(sum(self.depths[-1]), 1)

        return [subnet.name for subnet in sorted(self.subnets, key=distance)[:3]]


def _read(name: str) -> Subnet | None:
    match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)*)", name)
    if match is None:
        return None
    return Subnet(int(match[1]), tuple(int(depth) for depth in match[2].split(".")))


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
