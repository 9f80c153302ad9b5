"""Trains one run after another in the same processes: histories.py PLAN, a JSON list of objects with

config      the file
overrides   list of KEY=VALUE
ranks       how many; the others are through, so a larger number comes before a smaller one
port        at which they meet
backend     of torch.compile, "eager" (a block is traced, and its graph runs as it is) or "inductor", which compiles
            everything before the first step, too
"""

import json
import os
import sys
from functools import partialmethod

import torch

from kernels.dispatch import interpreted
from pipeline.config import load_config
from pipeline.elastic import Backbone
from pipeline.run import loop

compile_blocks, is_compiled = Backbone.compile_blocks, loop.is_compiled


def train(config: str, overrides: list[str], ranks: int, port: int, backend: str) -> None:
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    Backbone.compile_blocks = partialmethod(compile_blocks, backend=backend)
    loop.is_compiled = is_compiled if backend == "inductor" else lambda config: False
    assert loop.train(load_config(config, overrides), quiet=True) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if interpreted():
        from interpreting import few_programs

        few_programs()
    for run in json.loads(sys.argv[1]):
        if int(os.environ["RANK"]) < run["ranks"]:
            train(**run)
