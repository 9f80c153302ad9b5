"""Which gathered weights are alive when a backward pass begins: `gathered_weights.py OUT CONFIG...`.

DeepSpeed lets go of a gathered weight's memory, FSDP2 empties it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from thin_resnets import thin_resnets
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.config import load_config
from pipeline.engine import distributed, zero3
from pipeline.run.step import Trainer

zero3._GATHERING["stage3_param_persistence_threshold"] = 0  # all weights of these networks are small


def watch(path: Path, ranks: distributed.Ranks) -> list[list[str]]:
    """Per backward pass of two steps, the parameters whose gathered weights the forward pass left alive."""
    config = load_config(path)
    trainer = Trainer(config, ranks)
    trainer.start_data(0)
    net, seen, alive = trainer.engine.branch, [], []
    emptied = config.engine.backend == "fsdp2"

    def used(module: torch.nn.Module, *_: object) -> None:
        for name, parameter in module.named_parameters(prefix=places[module], recurse=module in blocks):
            if not isinstance(parameter, DTensor) and parameter.numel():  # gathered
                storage = parameter.untyped_storage()
                seen.append((name, storage if emptied else StorageWeakRef(storage)))

    def is_alive(storage: Any) -> bool:
        return storage.nbytes() > 0 if emptied else not storage.expired()

    names = {name for name, _ in net.named_parameters()}
    places = {module: name for name, module in net.named_modules()}
    blocks = set(net.backbone.elastic_blocks())  # gathered as one, before any of their layers
    inner = {module for block in blocks for module in block.modules()} - blocks
    for module in net.modules():
        if module not in inner:
            module.register_forward_pre_hook(used)
    backward = trainer.engine.backward

    def checked(loss: torch.Tensor) -> None:
        assert {name for name, _ in seen} == names, "a parameter was not watched"
        alive.append(sorted({name for name, storage in seen if is_alive(storage)}))
        seen.clear()
        backward(loss)

    trainer.engine.backward = checked  # type: ignore[method-assign]
    for step in range(2):
        trainer.step(step)
        seen.clear()
    trainer.close()
    return alive


if __name__ == "__main__":
    thin_resnets()
    world = distributed.initialize()
    results = {Path(path).stem: watch(Path(path), world) for path in sys.argv[2:]}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.shut_down()
