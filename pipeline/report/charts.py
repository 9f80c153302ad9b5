"""Charts as inline SVG, and tables, for a page that loads nothing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pipeline.errors import printable

COLORS = ("#3b7dd8", "#e07b39", "#3fa66b", "#a25fc4", "#d64f6b", "#2aa5b8", "#b58a1b", "#7a7f8a", "#5c6fd1")
MAX_POINTS = 400
WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 600, 220, 58, 10, 10, 34
Points = Sequence[tuple[float, float]]


class Axes:
    """Maps data to the drawing and draws the grid.

    Args:
        points: all that is to be drawn.
        x_title: under the axis.
        floor_zero: y begins at zero.
        log_x: logarithmic x, ticks at the points.
        least_span: of y, so that a difference that is none does not fill the chart.
        height: of the drawing, in its own units; its width is `WIDTH`.
    """

    def __init__(
        self,
        points: Points,
        x_title: str,
        floor_zero: bool = False,
        log_x: bool = False,
        least_span: float = 0.0,
        height: int = HEIGHT,
    ):
        self.x_title, self.log_x, self.height = x_title, log_x, height
        xs, ys = [self._x(x) for x, _ in points], [y for _, y in points]
        self.x_low, self.x_high = _widened(min(xs), max(xs))
        low, high = min(ys), max(ys)
        margin = max(0.0, least_span - (high - low)) / 2
        self.y_low, self.y_high = _widened(min(low, 0.0) if floor_zero else low - margin, high + margin)

    def place(self, x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (WIDTH - _LEFT - _RIGHT) * (self._x(x) - self.x_low) / (self.x_high - self.x_low)
        down = _TOP + (self.height - _TOP - _BOTTOM) * (self.y_high - y) / (self.y_high - self.y_low)
        return round(right, 1), round(down, 1)

    def draw(self) -> str:
        parts = []
        for i in range(5):
            y = self.y_low + (self.y_high - self.y_low) * i / 4
            down = _TOP + (self.height - _TOP - _BOTTOM) * (1 - i / 4)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>'
                f'<text x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{number(y)}</text>'
            )
        for i in range(5):
            x = self.x_low + (self.x_high - self.x_low) * i / 4
            right = _LEFT + (WIDTH - _LEFT - _RIGHT) * i / 4
            anchor = ("start", "middle", "middle", "middle", "end")[i]
            label = number(10**x if self.log_x else x)
            parts.append(f'<text x="{right}" y="{self.height - 20}" text-anchor="{anchor}">{label}</text>')
        parts.append(f'<text x="{WIDTH / 2}" y="{self.height - 4}" text-anchor="middle">{escape(self.x_title)}</text>')
        return "".join(parts)

    def _x(self, x: float) -> float:
        return math.log10(x) if self.log_x else x


def line_chart(
    title: str, series: Mapping[str, Points], note: str = "", floor_zero: bool = False, x_title: str = "step"
) -> str:
    """Curves with a legend of last values; empty if there is nothing finite to show."""
    finite = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    axes = Axes([p for points in finite.values() for p in points], x_title, floor_zero)
    art = axes.draw()
    for color, points in zip(_colors(), finite.values(), strict=False):
        places = [axes.place(*point) for point in points]
        if len(places) == 1:
            art += f'<circle cx="{places[0][0]}" cy="{places[0][1]}" r="3" fill="{color}"/>'
        else:
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            art += f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.7" stroke-linejoin="round"/>'
    last = {name: number(points[-1][1]) for name, points in finite.items()}
    return figure(title, art, last, note)


def scatter_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    x_title: str,
    note: str,
    least_span: float = 0.0,
) -> str:
    """Named points over a logarithmic axis; a point's name shows on hover, and beside it if there are few."""
    every = [point for points in series.values() for point in points]
    axes = Axes([(x, y) for x, y, _ in every], x_title, log_x=True, least_span=least_span)
    art = axes.draw()
    for color, points in zip(_colors(), series.values(), strict=False):
        for x, y, name in points:
            right, down = axes.place(x, y)
            art += f'<circle cx="{right}" cy="{down}" r="4" fill="{color}" fill-opacity="0.75"><title>'
            art += f"{escape(name)}: {number(y)}</title></circle>"
            if len(every) <= 12:
                anchor, dx = ("end", -7) if right > WIDTH * 0.8 else ("start", 7)
                art += f'<text x="{right + dx}" y="{down + 4}" text-anchor="{anchor}">{escape(name)}</text>'
    return figure(title, art, dict.fromkeys(series, ""), note)


def split_bar(title: str, parts: Mapping[str, float], unit: str) -> str:
    """Parts of a whole as one bar and a table."""
    total = sum(parts.values()) or 1.0
    bar, rows = "", []
    for color, (name, value) in zip(_colors(), parts.items(), strict=False):
        bar += f'<i style="width:{100 * value / total:.2f}%;background:{color}" title="{escape(name)}"></i>'
        swatch = f'<i class="swatch" style="background:{color}"></i>{escape(name)}'
        rows.append([swatch, f"{1000 * value:.1f} {unit}", f"{100 * value / total:.1f}%"])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<figure><h3>{escape(title)}</h3><div class="bar">{bar}</div><table>{body}</table></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain text cells."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(printable(str(cell)))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{cells}</table>"


def thinned(points: Points) -> Points:
    """At most `MAX_POINTS` points, means of neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    size = len(points) / MAX_POINTS
    groups = [points[int(i * size) : int((i + 1) * size)] for i in range(MAX_POINTS)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups if g]


def number(value: float) -> str:
    """A number as a person writes it: four digits, k and M, exponents only for the tiny."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g} M"
    if size >= 1e4:
        return f"{value / 1e3:.4g} k"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _colors() -> Iterable[str]:
    while True:
        yield from COLORS


def figure(title: str, art: str, legend: Mapping[str, str], note: str, height: int = HEIGHT) -> str:
    """A drawing with its title, a legend of names and values in the order of the colours, and a note."""
    names = "".join(
        f'<span><i class="swatch" style="background:{color}"></i>{escape(printable(name))} <b>{value}</b></span>'
        for color, (name, value) in zip(_colors(), legend.items(), strict=False)
    )
    return (
        f'<figure><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {height}">{art}</svg>'
        f'<div class="legend">{names}</div>{f"<p>{escape(note)}</p>" if note else ""}</figure>'
    )
