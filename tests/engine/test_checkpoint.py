"""Checkpoints from one engine to another, and what each rank writes of what several hold."""

from pathlib import Path

import pytest
import torch
import yaml

from pipeline.engine.groups import Piece
from pipeline.engine.layouts import Replica
from pipeline.engine.saved import VECTORS, intact_checkpoint, load_named
from pipeline.engine.snapshot import own_pieces

WORKER = Path(__file__).parents[1] / "workers" / "resaved.py"
ZERO1 = {"zero_stage": 1, "precision": "bf16"}
FSDP2 = {"backend": "fsdp2", "zero_stage": None, "precision": "bf16"}


def test_zero_1_on_4_ranks_then_fsdp2_on_2_and_3_and_back_keep_every_bit(launch, tmp_path, experiment):
    history = [(4, ZERO1), (2, FSDP2), (3, FSDP2), (2, {**FSDP2, "shard_size": "one"}), (4, ZERO1)]
    states, before = [], "none"
    for number, (ranks, engine) in enumerate(history):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(experiment(engine=engine)))
        launch(WORKER, ranks, tmp_path / f"{number}.yaml", tmp_path / str(number), before)
        before = tmp_path / str(number)
        path, manifest = intact_checkpoint(before)
        states.append({vector: load_named(path, manifest, vector) for vector in VECTORS})
        assert manifest["world_size"] == ranks
        assert manifest["optimizer_steps"] == 2
    first = states[0]
    assert first["exp_avg_sq"]["heads.heads.0.mlp.0.weight"].any()
    for state in states[1:]:
        for vector in VECTORS:
            assert all(torch.equal(state[vector][name], first[vector][name]) for name in first[vector])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_several_ranks_hold_is_written_once(count):
    pieces = [Piece(0, 10, 5), Piece(8, 20, 1), Piece(9, 40, 7)]
    parts = [own_pieces(pieces, Replica(index, count)) for index in range(count)]
    elements = [(p.local + i, p.start + i) for part in parts for p in part for i in range(p.length)]
    assert elements == [(p.local + i, p.start + i) for p in pieces for i in range(p.length)]
    sizes = [sum(p.length for p in part) for part in parts]
    assert max(sizes) == -(-13 // count)
