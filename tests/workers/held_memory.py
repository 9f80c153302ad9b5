"""Bytes of the tensors that a rank holds between two steps, beside the parameters: `held_memory.py CONFIG OUT`."""

import gc
import json
import sys

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


config, out = load_config(sys.argv[1]), sys.argv[2]
ranks = distributed.initialize(300)
before = held()
trainer = Trainer(config, ranks)
trainer.start_data(0)
for step in range(2):
    trainer.step(step)
after = held() - before
if ranks.is_main:
    with open(out, "w") as file:
        json.dump({"held": after}, file)
trainer.close()
distributed.shut_down()
