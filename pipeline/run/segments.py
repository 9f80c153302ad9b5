"""The segments of a run: from which sample on its data came from which sources, in which shares."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pipeline.data.mixing import ROWS, Mix, Start
from pipeline.data.order import PLAIN, Order
from pipeline.data.reader import Dataset
from pipeline.data.segments import order_of, recorded, segment_of
from pipeline.errors import UserError


def sources_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Name, share and shards of every source, as a segment records them."""
    parts = zip(dataset.sources, dataset.described(), strict=True)
    return [{"name": source.name, "share": source.share, **fingerprint(shards)} for source, shards in parts]


def fingerprint(shards: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """What identifies a data set: its shards' names, bytes and sample counts.

    Args:
        shards: (file name, bytes, samples) of each.
    """
    entries = sorted(shards)
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"shards": len(entries), "samples": sum(n for _, _, n in entries), "sha256": digest}


def identity(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint of all sources together."""
    digests = [source["sha256"] for source in sources]
    return {
        "shards": sum(source["shards"] for source in sources),
        "samples": sum(source["samples"] for source in sources),
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def settle_segments(
    manifest: dict[str, Any],
    sources: list[dict[str, Any]],
    wanted: int,
    samples: int,
    seed: int,
    where: str,
    forked: bool = False,
    order: Order = PLAIN,
) -> list[dict[str, Any]]:
    """The segments of a run that goes on, the last one for what follows.

    Args:
        manifest: as earlier starts left it.
        sources: of this start: name, share and what identifies the shards.
        wanted: `data.segment`.
        samples: consumed so far, where the run goes on.
        seed: of the data.
        where: the run directory.
        forked: another run begins here, which may have data of its own.
        order: of this start.

    Raises:
        UserError: sources, shares or order differ from those of the segment that `wanted` names.
    """
    past = [segment for segment in recorded(manifest) if segment["from_sample"] < max(samples, 1)] if samples else []
    head = {"segment": wanted, "from_sample": samples, **({} if order == PLAIN else {"order": list(order)})}
    anew = [{**head, "sources": [{**s, "start": 0} for s in sources]}]
    if not past:
        return anew
    last = past[-1]
    if wanted < last["segment"]:
        what = f"the run is in segment {last['segment']} of its data, and data.segment is {wanted}"
        raise UserError(what, where, f"set data.segment={last['segment']}")
    if wanted == last["segment"]:
        if problem := _difference(last["sources"], sources) or _other_order(order_of(last), order):
            if forked:
                return anew
            fix = f"restore that, or set data.segment={wanted + 1} to go on with this from sample {samples} on"
            raise UserError(f"the data is not read as the run began: {problem}", where, fix)
        return past
    begun = [{**source, "start": _start(source, last, samples, seed, order)} for source in sources]
    return [*past, {**head, "sources": begun}]


def _start(source: dict[str, Any], last: dict[str, Any], samples: int, seed: int, order: Order) -> Start:
    """Where a source goes on after a segment: where it was, in another order with its next epoch, and if it is another
    one at its beginning."""
    before = order_of(last)
    used = Mix([s["share"] for s in last["sources"]], seed, segment_of(last), before.lanes).used(samples)
    for old, start in zip(last["sources"], used, strict=True):
        if (old["name"], old["sha256"]) == (source["name"], source["sha256"]):
            return start if order == before else -(-_end(start) // source["samples"]) * source["samples"]
    return 0


def _end(start: Start) -> int:
    """The position of a source's stream behind all that were taken."""
    if isinstance(start, int):
        return start
    return max((taken - 1) * len(start) + lane + 1 if taken else 0 for lane, taken in enumerate(start))


def _other_order(before: Order, now: Order) -> str | None:
    return None if before == now else f"{before} there and {now} here"


def _difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    """The first thing in which two lists of sources differ."""
    if [s["name"] for s in before] != [s["name"] for s in now]:
        old, new = (", ".join(s["name"] or "one without a name" for s in sources) for sources in (before, now))
        return f"{old} there and {new} here"
    for one, other in zip(before, now, strict=True):
        if one["share"] != other["share"]:
            return f"{one['name']} has {one['share']} of {ROWS} there and {other['share']} here"
        if one["sha256"] != other["sha256"]:
            return f"other shards of {one['name'] or 'data.train'}"
    return None
