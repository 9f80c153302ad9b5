"""Train some steps with all widths compiled before the first, and without: rehearsed.py OUT CONFIG [CONFIG ...].

Writes, per configuration: losses of the steps either way, graphs compiled by then, and what was told. Without, the
first one compiles in its steps; the others compile nothing then, which is quicker and computes the same.
"""

import json
import sys
from functools import partialmethod
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from pipeline.config import ExperimentConfig, load_config
from pipeline.elastic import Subnet
from pipeline.elastic.backbone import Backbone
from pipeline.engine import distributed
from pipeline.run.rehearsal import rehearse
from pipeline.run.step import Trainer

STEPS = 3


class EveryWidth(Trainer):
    def draw(self, step: int) -> Subnet:
        widths = self.grid.widths
        return Subnet(widths[(step + self.ranks.rank) % len(widths)], self.grid.smallest.depths)


def train(config: ExperimentConfig, ranks: distributed.Ranks, rehearsed: bool) -> dict:
    torch._dynamo.reset()
    counters.clear()
    told: list = []
    trainer = EveryWidth(config, ranks)
    trainer.start_data(0)
    if rehearsed:
        rehearse(trainer, lambda *words: told.append(words))
    graphs = counters["stats"]["unique_graphs"]
    losses = [trainer.step(step).report.agreed.losses for step in range(STEPS)]
    steps_graphs = counters["stats"]["unique_graphs"] - graphs
    trainer.close()
    return {"losses": losses, "before": graphs, "during": steps_graphs, "told": told}


def either_way(config: ExperimentConfig, ranks: distributed.Ranks, compiled: bool) -> list[dict]:
    plain = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": compiled})})
    return [train(plain, ranks, rehearsed=False), train(config, ranks, rehearsed=True)]


def main() -> None:
    torch.set_num_threads(1)
    Backbone.compile_blocks = partialmethod(Backbone.compile_blocks, backend="eager")
    ranks = distributed.initialize()
    results = [either_way(load_config(path), ranks, compiled=i == 0) for i, path in enumerate(sys.argv[2:])]
    results = ranks.gather(results)
    if ranks.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.shut_down()


if __name__ == "__main__":
    main()
