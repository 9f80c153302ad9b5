"""Ranks on two nodes, each with a folder and a store of its own, killed at random and gone on with on other numbers."""

import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig
from pipeline.data.reading import Reading
from pipeline.data.shards import index

WORKER = Path(__file__).parents[2] / "workers" / "read_share.py"
SHARDS, EACH = {"a": 8, "b": 4}, 6
BATCH = 30
HISTORY = [(2, 2), (5, 2), (3, 1), (1, 1)]  # ranks and nodes, each for two to four batches of 30: over 3 epochs of 72
FAULTS = ("e503", "reset", "cut", "short", "whole", "stall")


@pytest.fixture
def folder(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    for name, count in SHARDS.items():
        for shard in range(count):
            files = {f"{name}{shard}{i}.jpg": pictures[(EACH * shard + i) % 32] for i in range(EACH)}
            path = make_shard(files, f"{name}-{shard:06d}.tar")
        index([str(path.parent / f"{name}-{shard:06d}.tar") for shard in range(count)])
    return path.parent


def data_of(url: str, cache: Path | None = None) -> dict[str, Any]:
    train = [{"name": name, "url": f"{url}/{name}-*.tar", "weight": count} for name, count in SHARDS.items()]
    return {"train": train, "lanes": 2, "window": 2, "seed": 5, "cache": {"folder": cache and str(cache)}}


class History:
    """Starts of a run, each on ranks and nodes of its own, and what they wrote down.

    Attributes:
        sample: from which the next start goes on: what all ranks of those before had read.
        ledger: record and checksum by position.
        codes, errors: of the processes of the last start.
    """

    def __init__(self, urls: list[str], folder: Path) -> None:
        self.urls, self.folder = urls, folder
        self.sample, self.starts, self.ledger = 0, 0, {}

    def go_on(self, ranks: int, nodes: int, dies: dict[int, int]) -> None:
        """Five batches, of which a rank that dies has as many as `dies` says."""
        self.starts += 1
        ledgers = [str(self.folder / f"ledger-{self.starts}-{rank}") for rank in range(ranks)]
        jobs, processes = [self.folder / f"job-{rank}.json" for rank in range(ranks)], []
        for rank, path in enumerate(jobs):
            node = rank * nodes // ranks
            job = {
                "data": {**data_of(self.urls[node], self.folder / f"node{node}"), "batch_size": BATCH // ranks},
                "rank": rank,
                "world_size": ranks,
                "on_node": [ledgers[other] for other in range(ranks) if other * nodes // ranks == node],
                "sample": self.sample,
                "batches": 5,
                "dies_at": dies.get(rank),
                "ledger": ledgers[rank],
            }
            path.write_text(json.dumps(job))
            processes.append(subprocess.Popen([sys.executable, WORKER, path], stderr=subprocess.PIPE, text=True))
        self.errors = [process.communicate()[1] for process in processes]
        self.codes = [process.returncode for process in processes]
        done = [Path(path).read_text().splitlines() if Path(path).exists() else [] for path in ledgers]
        saved = min(map(len, done))  # the last batch that all ranks had
        for lines in done:
            self.ledger |= {p: (record, crc) for line in lines[:saved] for p, record, crc in json.loads(line)}
        self.sample += saved * BATCH


def test_ledger_is_exact_and_a_node_fetches_its_share(folder: Path, tmp_path: Path, serve: Callable) -> None:
    servers = [serve(folder), serve(folder)]
    for server in servers:
        server.rate, server.faults = 0.15, FAULTS
    history, chance = History([server.url for server in servers], tmp_path), random.Random(1)
    names = [path.name for path in folder.glob("*.tar")]
    set_bytes = sum((folder / name).stat().st_size for name in names)

    servers[0].always = dict.fromkeys(names, "changed")
    history.go_on(2, 2, dies={})
    assert history.codes == [1, 0], "what changes under a run ends it"
    assert "the object has changed" in history.errors[0]
    servers[0].always = {}
    servers[0].versions.clear()  # brought back
    assert history.sample == 0
    for ranks, nodes in HISTORY:
        victim, batches = chance.randrange(ranks), chance.randrange(2, 5)
        history.go_on(ranks, nodes, {victim: batches})
        assert history.codes == [-9 if rank == victim else 0 for rank in range(ranks)], history.errors
        sent = [sum(server.sent[name] for name in names) for server in servers]
        if nodes == 2:
            assert max(sent) <= 1.3 / 2 * set_bytes, (ranks, sent, set_bytes)
            shared = sent[0]
    assert sent[0] - shared <= 1.3 / 2 * set_bytes, "the other half, when the node is alone"
    assert sum(server.met[fault] for server in servers for fault in FAULTS) > 1

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
