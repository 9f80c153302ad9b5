"""Embedded images on one page: a map of two dimensions, with their pictures on it."""

import base64
import importlib.util
import io
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.images import decode
from pipeline.data.reader import Dataset
from pipeline.errors import UserError, printable
from pipeline.evaluate.embed import read_part
from pipeline.report.charts import COLORS, table
from pipeline.report.template import page_of

POINTS, PICTURES = 3000, 250
"""At most on the page."""
_SIDE, _THUMB, _PIXELS = 1000, 46, 64  # of the drawing, of a picture on it, and of its file
_MARGIN = 30


class _Point(NamedTuple):
    shard: str
    record: int
    key: str
    label: int | None


def embedding_page(out: Path, manifest: dict[str, Any], method: str | None = None, kind: str | None = None) -> str:
    """The page as HTML that loads nothing from anywhere.

    Args:
        out: a folder that `evaluate.embed` has written.
        manifest: what it returned.
        method: "pca" or "umap"; the latter if it is installed and this is None.
        kind: which of its features; the first if None.
    """
    kind = kind or manifest["features"][0]
    x, points = _chosen(out, manifest, kind)
    method = method or ("umap" if importlib.util.find_spec("umap") else "pca")
    places, about = (_umap if method == "umap" else pca)(x)
    facts = [
        ["model", manifest["model"] + (f" at step {manifest['step']}" if "step" in manifest else "")],
        ["features", f"{kind}, {x.shape[1]} channels, normalised to length 1"],
        ["images", f"{manifest['samples']:,} embedded, {len(points):,} of them on the map"],
        ["map", about],
    ]
    labels = sorted({point.label for point in points if point.label is not None})
    sections = {"Map": _drawing(places, points, labels), "What this is": table(["", ""], facts)}
    return page_of(out.resolve().name, "Embedding", "Images by the features of a frozen network", sections)


def pca(x: np.ndarray) -> tuple[np.ndarray, str]:
    """`[N, 2]` along the two directions of largest variance, each pointing to where most of its weight is positive."""
    centred = x - x.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2] * np.sign(directions[:2].sum(1, keepdims=True) + 1e-30)
    shares = singular**2 / max((singular**2).sum(), 1e-30)
    places = centred @ directions.T
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    return places, f"PCA; the two directions hold {100 * shares[:2].sum():.0f}% of the variance"


def require_umap() -> None:
    """Raises UserError: UMAP is not installed."""
    if not importlib.util.find_spec("umap"):
        raise UserError("UMAP is not installed", "--map umap", "pip install umap-learn, or use --map pca")


def _umap(x: np.ndarray) -> tuple[np.ndarray, str]:
    import umap

    near = min(15, len(x) - 1)
    places = umap.UMAP(n_neighbors=near, metric="cosine", random_state=0, n_jobs=1).fit_transform(x)
    return places, f"UMAP of cosine distances, {near} neighbours; distances between far groups mean little"


def _chosen(out: Path, manifest: dict[str, Any], kind: str) -> tuple[np.ndarray, list[_Point]]:
    """Evenly spread samples of all parts, normalised."""
    step = max(-(-manifest["samples"] // POINTS), 1)
    rows, points, before = [], [], 0
    for number, part in enumerate(manifest["parts"]):
        features, beside = read_part(out, number, kind)
        kept = range(-before % step, len(features), step)
        before += len(features)
        rows.append(features[kept])
        columns = (beside["records"], beside["keys"], beside["labels"])
        points += [_Point(part["shard"], *(column[i] for column in columns)) for i in kept]
    x = np.concatenate(rows).astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12), points


def _drawing(places: np.ndarray, points: list[_Point], labels: list[int]) -> str:
    low, high = np.percentile(places, [0.5, 99.5], axis=0)  # a stray point would squeeze the others
    spread = ((places - low) / (high - low).clip(1e-12)).clip(0, 1)
    where = _MARGIN + (_SIDE - 2 * _MARGIN) * spread
    color: dict[int | None, str] = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    order = np.random.default_rng(0).permutation(len(points))
    pictured = _without_overlap(where, order)
    dots = [
        f'<circle cx="{x:.1f}" cy="{_SIDE - y:.1f}" r="3" fill="{color.get(p.label, COLORS[0])}" opacity="0.6">'
        f"<title>{escape(_title(p))}</title></circle>"
        for (x, y), p in zip(where, points, strict=True)
    ]
    shards = {shard: Dataset(shard) for shard in dict.fromkeys(points[i].shard for i in pictured)}
    images = [
        _image(where[i], points[i], color.get(points[i].label, COLORS[0]), shards[points[i].shard]) for i in pictured
    ]
    legend = "".join(
        f'<span><i class="swatch" style="background:{color[label]}"></i>class {label}</span>'
        for label in labels[: 3 * len(COLORS)]
    )
    note = f"Point at a picture for its key. {len(pictured)} of {len(points)} points are drawn as pictures."
    return (
        f'<figure style="max-width:70rem"><svg viewBox="0 0 {_SIDE} {_SIDE}">{"".join(dots)}{"".join(images)}</svg>'
        f'<div class="legend">{legend}</div><p>{escape(note)}</p></figure>'
    )


def _title(point: _Point) -> str:
    return printable(point.key) + (f", class {point.label}" if point.label is not None else "")


def _without_overlap(where: np.ndarray, order: np.ndarray) -> list[int]:
    """Points whose pictures leave one another room, `PICTURES` at most."""
    chosen: list[int] = []
    for i in order:
        apart = np.abs(where[chosen] - where[i]).max(1) if chosen else np.array([_SIDE])
        if apart.min() >= _THUMB + 4:
            chosen.append(int(i))
        if len(chosen) == PICTURES:
            break
    return chosen


def _image(place: np.ndarray, point: _Point, color: str, shard: Dataset) -> str:
    picture = decode(shard.image(point.record))
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    scale = _THUMB / max(picture.size)
    width, height = (side * scale for side in picture.size)
    x, y = place[0] - width / 2, _SIDE - place[1] - height / 2
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return (
        f'<g><image {box} href="data:image/jpeg;base64,{data}"/>'
        f'<rect {box} fill="none" stroke="{color}" stroke-width="2"><title>{escape(_title(point))}</title></rect></g>'
    )
