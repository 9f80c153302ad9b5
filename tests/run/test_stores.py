"""Training on shards in a store that misbehaves: what comes out is what comes of the same shards on a disk."""

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faulty_store import quick, serve
from scenes import write_tar

from pipeline.config import load_config
from pipeline.data import tars
from pipeline.data.reading import Reading
from pipeline.data.shards import index
from pipeline.files import read_json_lines

__all__ = ["quick", "serve"]
WORKER = Path(__file__).parents[1] / "workers" / "train_and_list.py"
SHARDS, EACH = {"a": 3, "b": 2}, 6
FAULTS = ("e503", "reset", "cut", "short", "whole", "stall")
COMPUTED = ("step", "images", "loss", "grad_norm", "lr", "subnet")


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    """Two sources of 18 and 12 samples; what lies beside the images makes each shard two pieces of a megabyte."""
    data = (digits / "train-000000.tar").read_bytes()
    images = [s.image for s in tars.walk(digits / "train-000000.tar") if s.image][: EACH * sum(SHARDS.values())]
    numbers = iter(range(len(images)))
    (tmp_path / "shards").mkdir()
    for source, count in SHARDS.items():
        paths = []
        for shard in range(count):
            files = {}
            for number in itertools.islice(numbers, EACH):
                image = images[number]
                files[f"{number:02d}.png"] = data[image.offset : image.offset + image.size]
                files[f"{number:02d}.txt"] = bytes(300_000)
            paths.append(tmp_path / "shards" / f"{source}-{shard:06d}.tar")
            write_tar(paths[-1], iter(files.items()))
        index([str(path) for path in paths])
    return paths[0].parent


def test_ranks_train_on_a_faulty_store_as_on_a_disk(
    launch: Callable[..., list[str]], experiment: Callable[..., Any], folder: Path, tmp_path: Path, serve: Callable
) -> None:
    """Two ranks, of which one is killed in its second batch on the store, then one rank, over one and a half epochs."""
    server = serve(folder)
    server.rate, server.faults = 0.15, FAULTS
    # room for a few of the ten pieces; the rest comes by single ranges
    cache = {"folder": str(tmp_path / "node"), "gb": 0.004}
    for name, place, more in (("disk", str(folder), {}), ("store", server.url, {"cache": cache})):
        train = [{"name": s, "url": f"{place}/{s}-*.tar", "weight": count} for s, count in SHARDS.items()]
        data = {"train": train, "lanes": 2, "window": 2, "piece_mb": 1, "seed": 5, **more}
        tree = experiment(data=data, run={"dir": str(tmp_path / name), "checkpoint_every_steps": 2})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    disk, store = tmp_path / "disk.yaml", tmp_path / "store.yaml"

    def train_on(start: int, ranks: int, *words: object, dies: int = -1) -> None:
        launch(WORKER, ranks, tmp_path / f"ledger{start}", dies, *words, f"data.batch_size={8 // ranks}")

    with pytest.raises(AssertionError, match="rank 1: exit code -9"):
        train_on(1, 2, store, "run.max_steps=3", dies=1)
    train_on(2, 2, disk, store, "run.max_steps=3")
    train_on(3, 1, disk, store, "run.max_steps=6")
    assert sum(server.met[fault] for fault in FAULTS) > 3
    assert list((tmp_path / "node").glob("*")), "pieces are kept"

    on_disk, on_store = (
        [{key: line[key] for key in COMPUTED} for line in read_json_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("disk", "store")
    )
    assert [line["images"] for line in on_store] == [8 * (i + 1) for i in range(6)]
    assert on_store == on_disk, "bit for bit"
    ledger: dict[int, set[tuple[int, int]]] = {}
    for path in (*tmp_path.glob("ledger1.0.*"), *tmp_path.glob("ledger[23].1.*")):
        for position, record, checksum in (row for line in path.read_text().splitlines() for row in json.loads(line)):
            ledger.setdefault(position, set()).add((record, checksum))
    reading = Reading(load_config(disk).data)
    expected = [(r := reading.stream.order(p), zlib.crc32(reading.dataset.image(r))) for p in range(8 * 6)]
    assert [ledger[position] for position in range(8 * 6)] == [{one} for one in expected]
