import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.mixing import Mix
from pipeline.data.order import PLAIN, Order
from pipeline.data.segments import order_of, segment_at, segment_of
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.run.segments import fingerprint, identity, settle_segments


def source(name: str, share: int, shards: int = 2) -> dict[str, Any]:
    return {"name": name, "share": share, **fingerprint((f"{name}-{i}.tar", 10 + i, 5) for i in range(shards))}


def settle(
    manifest: dict[str, Any],
    sources: list[dict[str, Any]],
    wanted: int = 0,
    samples: int = 0,
    forked: bool = False,
    order: Order = PLAIN,
) -> Any:
    return settle_segments(manifest, sources, wanted, samples, 3, "runs/x", forked, order)


AB = [source("a", 700), source("b", 300)]


def test_same_sources_go_on_and_any_other_is_refused_in_one_line() -> None:
    manifest = {"segments": settle({}, AB)}
    assert settle(manifest, AB, samples=500) == manifest["segments"]
    others = {
        "a has 700 of 1000 there and 600 here": [source("a", 600), source("b", 400)],
        "a, b there and a, c here": [source("a", 700), source("c", 300)],
        "other shards of b": [source("a", 700), source("b", 300, shards=3)],
        "a, b there and one without a name here": [source("", 1000)],
    }
    for problem, sources in others.items():
        with pytest.raises(UserError, match=rf"{problem} \(runs/x\): .*set data.segment=1 .* from sample 500 on"):
            settle(manifest, sources, samples=500)


def test_new_segment_knows_how_far_each_source_was() -> None:
    manifest = {"segments": settle({}, AB)}
    changed = [source("b", 500), source("c", 500)]
    segments = settle(manifest, changed, wanted=1, samples=1300)
    used = Mix([700, 300], 3).used(1300)
    assert segments[0] == manifest["segments"][0]
    assert segment_of(segments[1]) == (1, 1300, (used[1], 0))
    assert settle({"segments": segments}, changed, wanted=1, samples=2000) == segments
    with pytest.raises(UserError, match=r"in segment 1 .* data.segment is 0 .*set data.segment=1"):
        settle({"segments": segments}, AB, samples=2000)
    other_shards = [source("b", 500, shards=3), source("a", 500)]
    third = settle({"segments": segments}, other_shards, wanted=2, samples=2000)
    assert third[2]["sources"][0]["start"] == 0, "a source with other shards is another one"


def test_run_that_went_back_before_a_segment_forgets_it() -> None:
    segments = settle({"segments": settle({}, AB)}, AB[::-1], wanted=1, samples=1300)
    assert settle({"segments": segments}, AB, samples=800) == segments[:1]
    assert settle({"segments": segments}, AB, samples=0)[0]["from_sample"] == 0


def test_fork_goes_on_with_the_same_data_and_begins_other_data_anew() -> None:
    manifest = {"segments": settle({}, AB)}
    assert settle(manifest, AB, samples=500, forked=True) == manifest["segments"]
    (anew,) = settle(manifest, AB[:1], samples=500, forked=True)
    assert segment_of(anew) == (0, 500, (0,))


def test_run_of_a_version_without_segments_goes_on() -> None:
    plain = source("", 1000)
    manifest = {"data": identity([plain])}
    assert manifest["data"] == {key: plain[key] for key in ("shards", "samples", "sha256")}
    assert segment_of(settle(manifest, [plain], samples=40)[-1]) == (0, 0, (0,))
    with pytest.raises(UserError, match=r"other shards of data\.train"):
        settle(manifest, [source("", 1000, shards=3)], samples=40)


def test_report_finds_the_segment_of_a_step(tmp_path: Path) -> None:
    assert segment_at(tmp_path, 7) == (0, 0, ())
    segments = settle({"segments": settle({}, AB)}, AB[::-1], wanted=1, samples=1300)
    write_atomically(tmp_path / "manifest.json", json.dumps({"segments": segments}))
    assert segment_at(tmp_path, 1299).number == 0
    assert segment_at(tmp_path, 1300).begin == 1300


def test_other_lanes_or_pieces_want_a_segment_of_their_own_and_sources_begin_their_next_epoch() -> None:
    """Of `a` (10 images) 350 are read after 500 samples, of `b` 150: 15 and 15 more epochs, whole ones."""
    plain = {"segments": settle({}, AB)}
    assert "order" not in plain["segments"][0], "as every version wrote it"
    with pytest.raises(
        UserError, match=r"1 lane of whole shards there and 4 lanes of pieces of 64 MB here .*segment=1"
    ):
        settle(plain, AB, samples=503, order=Order(4, 64))
    segments = settle(plain, AB, wanted=1, samples=503, order=Order(4, 64))
    used = Mix([700, 300], 3).used(503)
    assert segment_of(segments[1]) == (1, 503, tuple(-(-count // 10) * 10 for count in used))
    assert order_of(segments[1]) == (4, 64)
    assert order_of(segments[0]) == (1, 0)
    assert settle({"segments": segments}, AB, wanted=1, samples=900, order=Order(4, 64)) == segments


def test_other_weights_in_lanes_go_on_in_every_lane() -> None:
    order = Order(2, 0)
    laned = settle({}, AB, order=order)
    changed = settle({"segments": laned}, [source("a", 500), source("b", 500)], 1, 501, order=order)
    used = Mix([700, 300], 3, lanes=2).used(501)
    assert segment_of(json.loads(json.dumps(changed[1]))) == (1, 501, tuple(used))
    assert sum(map(sum, used)) == 501
    back = settle({"segments": changed}, [source("a", 500), source("b", 500)], 2, 501)
    whole = [-(-max((taken - 1) * 2 + lane + 1 for lane, taken in enumerate(start)) // 10) * 10 for start in used]
    assert segment_of(back[-1]) == (2, 501, tuple(whole))
