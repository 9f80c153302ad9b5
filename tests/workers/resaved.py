"""Save a run's state, after two steps or as another engine has saved it: resaved.py CONFIG NEW OLD|none.

NEW and OLD are directories of checkpoints.
"""

import sys
from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.engine import distributed, zero
from pipeline.engine.checkpoint import Checkpoints, Progress
from pipeline.run.step import Trainer

STEPS = 2


def main() -> None:
    config, new, old = sys.argv[1:]
    torch.set_num_threads(1)
    zero.BUCKET = 30_000  # several of them
    ranks = distributed.initialize()
    trainer = Trainer(load_config(config), ranks)
    trainer.start_data(0)
    centering = trainer.tri_branch.centering
    if old == "none":
        for step in range(STEPS):
            trainer.step(step)
    else:
        checkpoints = Checkpoints(Path(old), 1, ranks)
        checkpoints.load(checkpoints.find(), trainer.engine, centering)
        checkpoints.close()
        with (
            trainer.engine.whole_teacher() as teacher
        ):  # what was loaded is what computes, and reading it changes nothing
            assert all(bool(p.isfinite().all()) for p in teacher.parameters())
    checkpoints = Checkpoints(Path(new), 1, ranks)
    checkpoints.begin(trainer.engine, centering, Progress(STEPS, 0, {}, 0, {}))
    checkpoints.finish()
    checkpoints.close()
    trainer.close()
    distributed.shut_down()


if __name__ == "__main__":
    main()
