"""Which gathered weights are alive when a backward pass begins, under ZeRO-3: `gathered_weights.py OUT CONFIG...`."""

import json
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.config import load_config
from pipeline.engine import distributed, zero3
from pipeline.run.step import Trainer

zero3._GATHERING["stage3_param_persistence_threshold"] = 0  # all weights of these networks are small


def watch(path: Path, ranks: distributed.Ranks) -> list[list[str]]:
    """Per backward pass of two steps, the parameters whose gathered weights the forward pass left alive."""
    trainer = Trainer(load_config(path), ranks)
    trainer.start_data(0)
    net, seen, alive = trainer.engine.engine.module, [], []

    def used(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=module in blocks):
            if parameter.numel():  # gathered
                seen.append((names[parameter], StorageWeakRef(parameter.untyped_storage())))

    names = {parameter: name for name, parameter in net.named_parameters()}
    blocks = set(net.backbone.elastic_blocks())  # gathered as one, before any of their layers
    inner = {module for block in blocks for module in block.modules()} - blocks
    for module in net.modules():
        if module not in inner:
            module.register_forward_pre_hook(used)
    backward = trainer.engine.backward

    def checked(loss: torch.Tensor) -> None:
        assert {name for name, _ in seen} == set(names.values()), "a parameter was not watched"
        alive.append(sorted({name for name, storage in seen if not storage.expired()}))
        seen.clear()
        backward(loss)

    trainer.engine.backward = checked  # type: ignore[method-assign]
    for step in range(2):
        trainer.step(step)
        seen.clear()
    trainer.close()
    return alive


if __name__ == "__main__":
    world = distributed.initialize()
    results = {Path(path).stem: watch(Path(path), world) for path in sys.argv[2:]}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.shut_down()
