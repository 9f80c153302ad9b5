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
FAULTS = ("e503", "reset", "cut", "short", "whole")


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


def test_ledger_is_exact_and_a_node_fetches_its_share(folder: Path, tmp_path: Path, serve: Callable) -> None:
    servers = [serve(folder), serve(folder)]
    for server in servers:
        server.rate, server.faults = 0.15, FAULTS
    set_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    chance, sample, ledger = random.Random(1), 0, {}
    sent_before = 0
    for ranks, nodes in HISTORY:
        victim = chance.randrange(ranks)
        jobs = []
        for rank in range(ranks):
            node = rank * nodes // ranks
            on_node = [other for other in range(ranks) if other * nodes // ranks == node]
            job = {
                "data": {**data_of(servers[node].url, tmp_path / f"node{node}"), "batch_size": BATCH // ranks},
                "rank": rank,
                "world_size": ranks,
                "on_node": [str(tmp_path / f"ledger-{sample}-{other}") for other in on_node],
                "sample": sample,
                "batches": 5,
                "dies_at": chance.randrange(2, 5) if rank == victim else None,
                "ledger": str(tmp_path / f"ledger-{sample}-{rank}"),
            }
            (tmp_path / f"job-{rank}.json").write_text(json.dumps(job))
            jobs.append(job)
        processes = [
            subprocess.Popen([sys.executable, str(WORKER), str(tmp_path / f"job-{r}.json")]) for r in range(ranks)
        ]
        codes = [process.wait() for process in processes]
        assert codes == [-9 if rank == victim else 0 for rank in range(ranks)]
        done = [Path(job["ledger"]).read_text().splitlines() for job in jobs]
        saved = min(map(len, done))  # the last batch that all ranks had
        assert saved == jobs[victim]["dies_at"]
        for lines in done:
            ledger |= {p: (record, crc) for line in lines[:saved] for p, record, crc in json.loads(line)}
        sample += saved * BATCH
        sent = [sum(size for name, size in server.sent.items() if name.endswith(".tar")) for server in servers]
        if nodes == 2:
            assert max(sent) <= 1.3 / 2 * set_bytes, (ranks, sent, set_bytes)
        if ranks == 5:
            sent_before = sent[0]
    assert sent[0] - sent_before <= 1.3 / 2 * set_bytes, "the other half, when the node is alone"
    assert sum(server.met.total() for server in servers) > 1

    assert sorted(ledger) == list(range(sample)), "every position once"
    local = Reading(DataConfig.model_validate(data_of(str(folder))))
    whole = local.stream
    images = {record: zlib.crc32(whole.dataset.image(record)) for record in range(len(whole.dataset))}
    assert [ledger[p] for p in range(sample)] == [(r := whole.order(p), images[r]) for p in range(sample)]
    places = [whole._place(p) for p in range(sample)]
    for number, source in enumerate(whole.dataset.sources):
        own = {place: ledger[p][0] - source.first for p, (of, place) in enumerate(places) if of == number}
        epochs = [range(e * source.samples, (e + 1) * source.samples) for e in range(9)]
        complete = [epoch for epoch in epochs if own.keys() >= set(epoch)]
        assert len(complete) >= 3
        assert all(sorted(own[place] for place in epoch) == list(range(source.samples)) for epoch in complete)
