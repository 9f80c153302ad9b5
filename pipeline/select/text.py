"""A selection as lines of text."""

from collections.abc import Sequence

from pipeline.errors import printable
from pipeline.select.choice import COSTS, QUALITIES, Network
from pipeline.select.selection import Selection

_HEADS = {"params": "M params", "gflops": "GFLOPs", "memory": "MB", "seconds": "ms"}


def text(selection: Selection) -> str:
    """The front, best first; how sure the latencies are; the best."""
    lines = [*_table(selection.front, selection), ""]
    total, fitting = len(selection.networks), len(selection.fitting)
    lines.append(f"{fitting} of {total} networks fit {_limits(selection)}; quality: {selection.about}")
    lines += latency_lines(selection)
    lines += [f"{QUALITIES[key].title} ranks them like {QUALITIES[selection.quality].title.removesuffix(' %')}: "
              f"rho {correlation}" for key, correlation in selection.correlations.items()]  # fmt: skip
    lines.append(f"best: {printable(selection.best.name)}")
    return "\n".join(lines)


def latency_lines(selection: Selection) -> list[str]:
    """How latencies were found, and how far predictions were off."""
    if not any(network.timing for network in selection.networks):
        return []
    timed = sum(network.timing is not None for network in selection.networks)
    line = f"latency on {selection.wanted.machine}: {timed} networks timed"
    if timed < len(selection.networks):
        line += f", {len(selection.networks) - timed} predicted (~)"
    if error := selection.error:
        line += (
            f"; of {error.networks} networks predicted first and timed then, predictions were off by "
            f"{error.median:.1%} (median; at most {error.largest:.1%})"
        )
    return [line]


def _table(networks: Sequence[Network], selection: Selection) -> list[str]:
    quality = QUALITIES[selection.quality]
    costs = [key for key in COSTS if any(network.cost(key) is not None for network in networks)]
    rows = [["front", *(_HEADS[key] for key in costs), quality.title]]
    for network in networks:
        cells = [cell(network, key) for key in costs]
        rows.append([printable(network.name), *cells, quality.show(network.quality[selection.quality])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def cell(network: Network, key: str) -> str:
    """A cost in the unit of its column; a latency with its quartiles, or with ~ if it is a prediction."""
    value, scale = network.cost(key), COSTS[key].scale
    if value is None:
        return ""
    if key != "seconds":
        return f"{value / scale:.3g}"
    if network.timing is None:
        return f"~{value / scale:.3g}"
    return f"{value / scale:.3g} ({network.timing.low / scale:.3g}-{network.timing.high / scale:.3g})"


def _limits(selection: Selection) -> str:
    limits = selection.wanted.limits
    if not limits:
        return "(no limit)"
    return " ".join(f"{COSTS[key].option} {COSTS[key].show(limit)}" for key, limit in limits.items())
