"""Write a run directory whose weights are random but not initial, student and teacher apart: X.yaml ... -> X/ ..."""

import sys
from pathlib import Path

import torch

from pipeline.config import dump_config, load_config
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Checkpoints, Progress
from pipeline.engine.core import Engine
from pipeline.method.losses import Centering
from pipeline.run.step import build_student


def write_run(source: Path, ranks: distributed.Ranks) -> None:
    config, directory = load_config(source), source.with_suffix("")
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    engine = Engine(build_student(config), config.optim, config.engine, ranks.device)
    generator = torch.Generator().manual_seed(1)
    for group in engine.groups:
        for vector in (group.master.data, group.ema):
            vector.add_(torch.randn(vector.shape, generator=generator), alpha=0.05)
    engine.refresh()
    centering = Centering(config.loss.centering, config.heads.prototypes, ranks.device, "eager")
    checkpoints = Checkpoints(directory / "checkpoints", 1, ranks)
    checkpoints.begin(engine, centering, Progress(3, 12, {}, 0, {}))
    checkpoints.finish()
    engine.destroy()


if __name__ == "__main__":
    world = distributed.initialize()
    for path in sys.argv[1:]:
        write_run(Path(path), world)
    distributed.shut_down()
