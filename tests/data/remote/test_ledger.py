"""Ranks on one and two nodes, each with a folder of its own, killed at random and gone on with on other numbers."""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from real_stores import Served, moto, nginx

from pipeline.config import DataConfig
from pipeline.data.mixing import ROWS
from pipeline.data.reading import Reading
from pipeline.data.shards import index

WORKER = Path(__file__).parents[2] / "workers" / "read_share.py"
SHARDS, EACH, LANES = {"a": 8, "b": 4}, 50, 2
BATCH, BATCHES = 210, 5
EPOCHS = BATCH * BATCHES / (EACH * sum(SHARDS.values()))
ON_TWO, ON_ONE = (2, 5, 3), (3, 1, 5, 2)  # ranks of one start after the other
FAULTS = ("e503", "reset", "cut", "short", "whole", "stall")


@pytest.fixture
def folder(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    for name, count in SHARDS.items():
        for shard in range(count):
            files = {f"{name}{shard}-{i}.jpg": pictures[(EACH * shard + i) % 32] for i in range(EACH)}
            path = make_shard(files, f"{name}-{shard:06d}.tar")
        index([str(path.parent / f"{name}-{shard:06d}.tar") for shard in range(count)])
    return path.parent


@pytest.fixture
def faulty(folder: Path, serve: Callable) -> list[Any]:
    """For each of two nodes a store in which 15% of the requests go wrong."""
    servers = [serve(folder), serve(folder)]
    for server in servers:
        server.rate, server.faults = 0.15, FAULTS
        server.far_away = True  # so that pieces are here before much is asked for that is still on its way
    return servers


@pytest.fixture(params=["faulty", "nginx", "moto"])
def stores(
    request: pytest.FixtureRequest, folder: Path, quick: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """The same set as each of two nodes finds it."""
    if request.param == "faulty":
        servers = request.getfixturevalue("faulty")
        yield [Served(server.url, {}, lambda sent=server.sent: total(sent)) for server in servers]
        assert sum(server.met[fault] for server in servers for fault in FAULTS) > 5
        return
    with ExitStack() as stack:
        opened = [
            nginx(folder, tmp_path_factory.mktemp("nginx")) if request.param == "nginx" else moto(folder)
            for _ in range(2)
        ]
        yield [stack.enter_context(one) for one in opened]


def total(sent: Counter[str]) -> int:
    return sum(size for name, size in sent.items() if name.endswith(".tar"))


def data_of(url: str, cache: Path | None = None) -> dict[str, Any]:
    train = [{"name": name, "url": f"{url}/{name}-*.tar", "weight": count} for name, count in SHARDS.items()]
    return {"train": train, "lanes": LANES, "window": 2, "seed": 5, "cache": {"folder": cache and str(cache)}}


class History:
    """Starts of a run, each on ranks and nodes of its own, and what they wrote down.

    Attributes:
        sample: from which the next start goes on: what all ranks of those before had read.
        ledger: record and checksum by position.
    """

    def __init__(self, stores: list[Served], folder: Path, launch: Callable[..., list[str]]) -> None:
        self.stores, self.folder, self.launch = stores, folder, launch
        self.sample, self.starts, self.ledger = 0, 0, {}

    def go_on(self, ranks: int, nodes: int, dies: dict[int, int]) -> str:
        """Some batches, of which a rank that dies has as many as `dies` says; returns what is said of failed ranks."""
        self.starts += 1
        ledgers, failed = [str(self.folder / f"ledger-{self.starts}-{rank}") for rank in range(ranks)], ""
        for rank in range(ranks):
            node = rank * nodes // ranks
            job = {
                "environment": self.stores[node].environment,
                "data": {**data_of(self.stores[node].url, self.folder / f"node{node}"), "batch_size": BATCH // ranks},
                "rank": rank,
                "world_size": ranks,
                "on_node": [ledgers[other] for other in range(ranks) if other * nodes // ranks == node],
                "sample": self.sample,
                "batches": BATCHES,
                "dies_at": dies.get(rank),
                "ledger": ledgers[rank],
            }
            (self.folder / f"job-{rank}.json").write_text(json.dumps(job))
        try:
            self.launch(WORKER, ranks, self.folder, timeout=500)
        except AssertionError as error:
            failed = str(error)
        done = [Path(path).read_text().splitlines() if Path(path).exists() else [] for path in ledgers]
        saved = min(map(len, done))  # the last batch that all ranks had
        for lines in done:
            self.ledger |= {p: (record, crc) for line in lines[:saved] for p, record, crc in json.loads(line)}
        self.sample += saved * BATCH
        return failed


def test_ledger_is_exact_and_a_node_fetches_its_share(
    folder: Path, tmp_path: Path, stores: list[Served], launch: Callable[..., list[str]]
) -> None:
    history, chance = History(stores, tmp_path, launch), random.Random(1)
    set_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    for start, (nodes, ranks) in enumerate([*((2, ranks) for ranks in ON_TWO), *((1, ranks) for ranks in ON_ONE)]):
        before, begin = [store.sent() for store in stores], history.sample
        victim, batches = chance.randrange(ranks), chance.randrange(2, BATCHES)
        failed = history.go_on(ranks, nodes, {victim: batches})
        assert re.findall(r"rank (\d+): exit code (-?\d+)", failed) == [(str(victim), "-9")], failed
        assert history.sample - begin == batches * BATCH
        sent = [(store.sent() - old) / set_bytes for store, old in zip(stores, before, strict=True)]
        if start == 0:  # nothing is here yet, and each half is fetched once for all that is read of it
            assert max(sent) <= 1.3 / 2, sent
        elif nodes == 2:  # of five ranks, or three, one reads from both halves: the other's by single ranges
            assert sent[0] <= 1.3 / 2 * EPOCHS, sent
            assert sent[1] <= 0.1, sent
        elif start == len(ON_TWO):
            assert sent[0] <= 1.3 / 2, "the other half, when the node is alone"
        else:
            assert max(sent) <= 0.1, "all of it is here"
    check_ledger(history, folder)


def check_ledger(history: History, folder: Path) -> None:
    ledger, sample = history.ledger, history.sample
    assert sorted(ledger) == list(range(sample)), "every position once"
    whole = Reading(DataConfig.model_validate(data_of(str(folder)))).stream
    images = {record: zlib.crc32(whole.dataset.image(record)) for record in range(len(whole.dataset))}
    assert [ledger[p] for p in range(sample)] == [(r := whole.order(p), images[r]) for p in range(sample)]
    places = [whole._place(p) for p in range(sample)]
    for number, source in enumerate(whole.dataset.sources):
        own = {place: ledger[p][0] - source.first for p, (of, place) in enumerate(places) if of == number}
        epochs = [range(e * source.samples, (e + 1) * source.samples) for e in range(9)]
        complete = [epoch for epoch in epochs if own.keys() >= set(epoch)]
        assert len(complete) >= 3
        assert all(sorted(own[place] for place in epoch) == list(range(source.samples)) for epoch in complete)
    blocks = [
        range(lane + LANES * begin, lane + LANES * (begin + ROWS), LANES)
        for lane in range(LANES)
        for begin in range(0, sample // LANES - ROWS + 1, ROWS)
    ]
    assert len(blocks) == 2 * LANES
    second = whole.dataset.sources[1].first
    assert {sum(ledger[p][0] >= second for p in block) for block in blocks} == {333}, (
        "a third, in every block of a lane"
    )


def test_object_that_changes_under_a_run_ends_it(
    folder: Path, tmp_path: Path, faulty: list[Any], launch: Callable[..., list[str]]
) -> None:
    faulty[0].always = {path.name: "changed" for path in folder.glob("*.tar")}
    history = History([Served(server.url, {}, int) for server in faulty], tmp_path, launch)
    failed = history.go_on(2, 2, dies={})
    assert re.findall(r"rank (\d+): exit code (-?\d+)", failed) == [("0", "1")], failed
    assert "the object has changed" in failed
    assert history.sample == 0
