"""Bytes of the tensors that a rank holds between two steps, beside those before: `held_memory.py OUT CONFIG...`."""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.run.step import Trainer


def held() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is DTensor:  # what it holds is a tensor of its own
            continue
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_by(path: str, ranks: distributed.Ranks) -> int:
    before = held()
    trainer = Trainer(load_config(path), ranks)
    trainer.start_data(0)
    for step in range(2):
        trainer.step(step)
    after = held() - before
    trainer.close()
    return after


if __name__ == "__main__":
    out, *configs = sys.argv[1:]
    world = distributed.initialize(300)
    found = [held_by(path, world) for path in configs]
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    distributed.shut_down()
