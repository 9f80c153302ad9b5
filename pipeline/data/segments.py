"""The segments of a run's data, as its manifest records them; `run.segments` decides where they begin."""

from pathlib import Path
from typing import Any

from pipeline.data.mixing import ROWS, Segment
from pipeline.data.order import PLAIN, Order
from pipeline.files import read_json


def segment_of(entry: dict[str, Any]) -> Segment:
    """What the sample stream needs to know of a segment."""
    starts = [source["start"] for source in entry["sources"]]  # one number, or one for every lane
    whole = tuple(tuple(start) if isinstance(start, list) else start for start in starts)
    return Segment(entry["segment"], entry["from_sample"], whole)


def order_of(entry: dict[str, Any]) -> Order:
    """Lanes and pieces of a segment; one of a version that knew none has the plain order."""
    return Order(*entry.get("order", PLAIN))


def segment_at(run: Path, sample: int) -> Segment:
    """The segment that a sample of a run was in."""
    path = run / "manifest.json"
    known = recorded(read_json(path, "restore it")) if path.exists() else []
    past = [segment for segment in known if segment["from_sample"] <= sample]
    return segment_of(past[-1]) if past else Segment()


def recorded(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments of a manifest; one of a version that knew none has one source without a name."""
    if "segments" in manifest or "data" not in manifest:
        return manifest.get("segments", [])
    return [{"segment": 0, "from_sample": 0, "sources": [{"name": "", "share": ROWS, **manifest["data"], "start": 0}]}]
