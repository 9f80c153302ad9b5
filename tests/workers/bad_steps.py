"""Two ranks of which one computes a loss that is not finite in some steps.

Usage: bad_steps.py OUT CONFIG...; OUT receives, per config, the exit code and whether each bad step left all state as
it was.
"""

import json
import os
import sys

import torch
from torch.distributed.tensor import DTensor

import pipeline.run.loop
from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.engine.core import Engine
from pipeline.method import losses
from pipeline.run.step import Trainer

BAD_STEPS = {1, 3, 4, 5}
now = {"step": -1, "call": 0}
unchanged: list[bool] = []
ibot, step = losses.ibot, Trainer.step


def poisoned_ibot(*args, **kwargs):
    now["call"] += 1
    value = ibot(*args, **kwargs)
    elastic = now["call"] % 2 == 0
    return value * float("nan") if elastic and now["step"] in BAD_STEPS and os.environ["RANK"] == "1" else value


def state(engine: Engine) -> list[torch.Tensor]:
    tensors = [*engine.shard.vectors, engine.shard.steps]
    weights = [getattr(p, "ds_tensor", p) for p in engine.branch.parameters()]  # ZeRO-3 holds a shard
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in weights]  # and FSDP2
    return [t.detach().clone() for t in [*tensors, *weights]]


def watched_step(self, number, *args):
    now["step"] = number
    before = state(self.engine)
    report = step(self, number, *args)
    if number in BAD_STEPS:
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, state(self.engine), strict=True)))
    return report


def main() -> None:
    torch.set_num_threads(1)
    losses.ibot, Trainer.step = poisoned_ibot, watched_step
    shut_down, distributed.shut_down = distributed.shut_down, lambda: None  # one process group for all runs
    results = []
    for path in sys.argv[2:]:
        unchanged.clear()
        code = pipeline.run.loop.train(load_config(path, ["loss.ibot_start_epoch=0"]))
        results.append({"code": code, "unchanged": list(unchanged)})
    shut_down()
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
