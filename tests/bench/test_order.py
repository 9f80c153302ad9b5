import json
import sys

import pytest

from pipeline.bench.__main__ import main
from pipeline.bench.order import benchmark_order


def test_nodes_fetch_their_lanes_once_and_more_lanes_mix_better() -> None:
    found = benchmark_order(gb=16, shard_mb=64, per_shard=100, nodes=[1, 4], pieces=[0], batch=512, window=2)
    assert found["shards"] == 256
    rows = {(row["nodes"], row["lanes"]): row for row in found["rows"]}
    names = ("first_epoch_gb", "of_it_one_by_one_gb", "second_epoch_gb")
    assert {key: tuple(row[name] for name in names) for key, row in rows.items()} == {
        (1, 1): (16, 0, 0),
        (1, 8): (16, 0, 0),
        (4, 1): (4, 4, 4),
        (4, 4): (4, 0, 0),
        (4, 32): (4, 0, 0),
    }
    assert rows[1, 1]["imbalance"] > rows[4, 4]["imbalance"] > rows[4, 32]["imbalance"] > found["perfect"] > 0.1


def test_command_prints_the_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "order --gb 1 --shard-mb 64 --per-shard 100 --nodes 2 --piece-mb 16 --batch 64"
    monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
    assert main() == 0
    assert [row["lanes"] for row in json.loads(capsys.readouterr().out)["rows"]] == [1, 2, 16]
