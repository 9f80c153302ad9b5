"""A selection as one page: quality over each cost, the fronts drawn, names on the points."""

import math
from collections.abc import Sequence
from html import escape

from pipeline.errors import printable
from pipeline.report.charts import COLORS, WIDTH, Axes, figure, number, table
from pipeline.report.template import page_of
from pipeline.select.choice import COSTS, QUALITIES, Network, fits, front, ranked
from pipeline.select.selection import Selection
from pipeline.select.text import cell, latency_lines

_HEIGHT = 380
_LEAST_SPAN = 0.02  # of an accuracy: less is noise on most validation sets
_KINDS = {"of the run": COLORS[0], "on the front": COLORS[1], "other models": COLORS[2], "does not fit": "#9aa3af"}
_LETTER, _LINE = 6.2, 12.0  # size of a letter of a name in a drawing


def page(selection: Selection) -> str:
    """The page as HTML that loads nothing from anywhere."""
    title = QUALITIES[selection.quality].title
    costs = [key for key in COSTS if any(n.cost(key) is not None for n in selection.networks)]
    charts = "".join(_pareto(selection, key) for key in costs)
    sections = {
        "Answer": _answer(selection),
        f"{title.removesuffix(' %')} over cost": f'<div class="charts">{charts}</div>',
        "Scores without labels": _label_free(selection),
        "Networks": _all(selection, costs),
    }
    names = ", ".join(path.resolve().name for path in selection.wanted.paths)
    return page_of(names, "Select", "Which network to ship", sections)


def _answer(selection: Selection) -> str:
    best, quality = selection.best, QUALITIES[selection.quality]
    tiles = {"Best that fits": best.name, quality.title: quality.show(best.quality[selection.quality])}
    for key, cost in COSTS.items():
        value, limit = best.cost(key), selection.wanted.limits.get(key)
        if value is not None:
            shown = cost.show(value) + (f" of {cost.show(limit)}" if limit else "")
            tiles[cost.title.capitalize() if key != "gflops" else cost.title] = shown
    tiles["Networks that fit"] = f"{len(selection.fitting)} of {len(selection.networks)}"
    boxes = "".join(f"<div><span>{escape(k)}</span><b>{escape(printable(v))}</b></div>" for k, v in tiles.items())
    notes = [f"quality: {selection.about}", *latency_lines(selection)]
    return f'<div class="tiles">{boxes}</div>' + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _pareto(selection: Selection, key: str) -> str:
    """Quality over one cost; a staircase joins the networks that no other beats."""
    quality, cost, limits = QUALITIES[selection.quality], COSTS[key], selection.wanted.limits
    networks = [n for n in selection.networks if selection.quality in n.quality and n.cost(key) is not None]
    points = {n.name: ((n.cost(key) or 0) / cost.scale, n.quality[selection.quality] * (100 if quality.percent else 1))
              for n in networks}  # fmt: skip
    best = front(selection.fitting, key, selection.quality)
    limit = limits.get(key)
    corners = [*points.values(), *([(limit / cost.scale, next(iter(points.values()))[1])] if limit else [])]
    if key == "seconds":  # room for the bars
        corners += [(1e3 * t, points[n.name][1]) for n in networks if n.timing for t in (n.timing.low, n.timing.high)]
    span = 100 * _LEAST_SPAN if quality.percent else 0.0
    axes = Axes(corners, f"{cost.title} {f'[{cost.unit}]' if cost.unit else ''}", False, True, span, _HEIGHT)
    art = axes.draw() + (_limit_line(axes, limit / cost.scale) if limit else "")
    art += _staircase([axes.place(*points[n.name]) for n in best])
    for network in networks:
        art += _point(axes, network, points[network.name], cell(network, key), selection, network in best)
    art += _names(axes, {n.name: points[n.name] for n in [*reversed(best), *(n for n in networks if n.rival)]})
    used = {_kind(n, selection, n in best) for n in networks}
    legend = "".join(f'<span><i class="swatch" style="background:{color}"></i>{kind}</span>'
                     for kind, color in _KINDS.items() if kind in used)  # fmt: skip
    note = "hollow: predicted; bars: quartiles" if key == "seconds" else ""
    drawn = figure(f"{quality.title} over {cost.title}", art, {}, note, _HEIGHT)
    return drawn.replace('<div class="legend"></div>', f'<div class="legend">{legend}</div>')


def _kind(network: Network, selection: Selection, on_front: bool) -> str:
    if not fits(network, selection.wanted.limits):
        return "does not fit"
    if network.rival:
        return "other models"
    return "on the front" if on_front else "of the run"


def _point(
    axes: Axes, network: Network, place: tuple[float, float], shown: str, selection: Selection, on_front: bool
) -> str:
    x, y = axes.place(*place)
    color = _KINDS[_kind(network, selection, on_front)]
    predicted = "ms" in axes.x_title and network.timing is None
    paint = f'fill="{"none" if predicted else color}" stroke="{color}" stroke-width="1.5"'
    title = f"<title>{escape(printable(network.name))}: {number(place[1])} at {escape(shown)}</title>"
    bar = ""
    if "ms" in axes.x_title and network.timing:
        ends = [axes.place(1e3 * value, place[1])[0] for value in (network.timing.low, network.timing.high)]
        bar = f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}" stroke="{color}"/>'
    if network.rival:
        return bar + f'<path d="M{x} {y - 6}L{x + 6} {y}L{x} {y + 6}L{x - 6} {y}Z" {paint}>{title}</path>'
    return bar + f'<circle cx="{x}" cy="{y}" r="4" {paint}>{title}</circle>'


def _staircase(places: Sequence[tuple[float, float]]) -> str:
    if len(places) < 2:
        return ""
    path = f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])
    return f'<path d="{path}" fill="none" stroke="{_KINDS["on the front"]}" stroke-opacity="0.6" stroke-width="1.5"/>'


def _limit_line(axes: Axes, limit: float) -> str:
    x, top = axes.place(limit, axes.y_high)
    _, bottom = axes.place(limit, axes.y_low)
    return (
        f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="{COLORS[4]}" stroke-dasharray="4 3"/>'
        f'<text x="{x - 4}" y="{bottom - 4}" text-anchor="end">limit</text>'
    )


def _names(axes: Axes, points: dict[str, tuple[float, float]]) -> str:
    """Names beside their points, above or below them, where they hide no other name."""
    taken: list[tuple[float, float, float, float]] = []
    art = ""
    for name, point in points.items():
        x, y = axes.place(*point)
        width = _LETTER * len(name)
        for left, base in ((x - width - 7, y - 4), (x + 7, y + 12), (x - width - 7, y + 12), (x + 7, y - 6)):
            box = (left, base - _LINE, left + width, base)
            free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if free and left >= 60 and box[2] <= WIDTH - 4 and box[1] >= 0 and base < _HEIGHT - 34:
                taken.append(box)
                art += f'<text x="{left:.1f}" y="{base:.1f}">{escape(printable(name))}</text>'
                break
    return art


def _label_free(selection: Selection) -> str:
    if not selection.correlations:
        return ""
    title = QUALITIES[selection.quality].title
    rows = [
        [QUALITIES[key].title.removesuffix(" %"), f"{c.rho:+.2f}" if math.isfinite(c.rho) else "none",
         f"{c.low:+.2f} to {c.high:+.2f}" if math.isfinite(c.low) else "too few networks", c.networks]
        for key, c in selection.correlations.items()
    ]  # fmt: skip
    charts = "".join(_against(selection, key) for key in selection.correlations)
    return (
        f"<p>How well a ranking without labels agrees with {escape(title.removesuffix(' %'))} on this run (Spearman's "
        "rho; +1 is the same order). The interval takes the networks for independent, which they are not.</p>"
        + table(["score", "rho", "95% interval", "networks"], rows)
        + f'<div class="charts">{charts}</div>'
    )


def _against(selection: Selection, key: str) -> str:
    kind, quality = QUALITIES[key], QUALITIES[selection.quality]
    known = [n for n in selection.networks if key in n.quality and selection.quality in n.quality]
    scales = [100 if k.percent else 1 for k in (kind, quality)]
    points = {n.name: (scales[0] * n.quality[key], scales[1] * n.quality[selection.quality]) for n in known}
    axes = Axes(list(points.values()), kind.title + (" (less is better)" if kind.sign < 0 else ""))
    art = axes.draw() + "".join(_point(axes, n, points[n.name], number(points[n.name][0]), selection, False)
                                for n in known)  # fmt: skip
    return figure(f"{quality.title} over {kind.title}", art, {}, f"rho {selection.correlations[key]}")


def _all(selection: Selection, costs: Sequence[str]) -> str:
    scores = [key for key in QUALITIES if any(key in n.quality for n in selection.networks)]
    titles = {"params": "M parameters", "gflops": "GFLOPs", "memory": "memory MB", "seconds": "ms (quartiles)"}
    head = ["network", *(titles[key] for key in costs), *(QUALITIES[key].title for key in scores), "fits"]
    order = [*ranked(selection.networks, selection.quality)]
    order += [n for n in selection.networks if n not in order]
    rows = [
        [
            n.name,
            *(cell(n, key) for key in costs),
            *(QUALITIES[key].show(n.quality[key]) if key in n.quality else "" for key in scores),
            "yes" if fits(n, selection.wanted.limits) else "no",
        ]
        for n in order
    ]
    return table(head, rows)
