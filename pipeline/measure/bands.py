"""Sub-networks in a few bands of cost, so that hundreds of them fit on one chart."""

from pipeline.config import ModelConfig
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, Subnet
from pipeline.measure.metrics import BANDS


class Bands:
    """Quarters of the draws, by FLOPs of one image.

    Args:
        model: the elastic backbone.
        grid: its sub-networks with the frequencies of their draws.

    Attributes:
        gflops: of the dearest sub-network per band, in the order of `BANDS`.
    """

    def __init__(self, model: ModelConfig, grid: Grid):
        flops = {subnet: cost.flops(model, subnet) for subnet in grid.subnets}
        ordered = sorted(grid.subnets, key=flops.__getitem__)
        if len(ordered) > 1:
            ordered.remove(grid.largest)  # never drawn
        total = sum(map(grid.multiplicity, ordered))
        self._index = {grid.largest: len(BANDS) - 1}
        self.gflops = [0.0] * len(BANDS)
        below = 0
        for subnet in ordered:
            band = min(len(BANDS) * below // total, len(BANDS) - 1)
            self._index[subnet] = band
            self.gflops[band] = flops[subnet] / 1e9
            below += grid.multiplicity(subnet)

    def index(self, subnet: Subnet | None) -> int | None:
        """Position in `BANDS`; None if there is no elastic student."""
        return self._index[subnet] if subnet else None
