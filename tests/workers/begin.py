"""One of several ranks that build a run and save at once what it begins with: CONFIG OUT [CONFIG OUT ...]."""

import sys
from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Checkpoints, Progress
from pipeline.run.step import Trainer

torch.set_num_threads(1)
ranks = distributed.initialize()
words = sys.argv[1:]
for path, out in zip(words[::2], words[1::2], strict=True):
    torch.manual_seed(ranks.rank)
    trainer = Trainer(load_config(path), ranks)
    checkpoints = Checkpoints(Path(out), 1, ranks)
    checkpoints.begin(trainer.engine, trainer.tri_branch.centering, Progress(0, 0, {}, 0, {}))
    checkpoints.finish()
    checkpoints.close()
    trainer.close()
distributed.shut_down()
