"""Two ranks whose checkpoints are written slowly, until one of them cannot be.

Usage: held_saves.py OUT WHOLE HELD: trains WHOLE undisturbed, then HELD, whose files are written only after the step
that follows their snapshot, and that of `FULL_AT` on rank 1 not at all; then HELD again. OUT receives what rank 0 saw.
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import torch

import pipeline.run.loop
from pipeline.config import load_config
from pipeline.engine import checkpoint, distributed
from pipeline.run.step import Trainer

FULL_AT = 6
save_tensors, step = checkpoint.save_tensors, Trainer.step
begin, move_on = checkpoint.Checkpoints.begin, checkpoint.Checkpoints.move_on
steps_made = 0
made_one = threading.Condition()
seen: list[list] = []


def slow_save(tensors, path: Path) -> None:
    saved = int(path.parent.name[len(".step_") : -len(".tmp")])
    if saved == FULL_AT and os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device")
    with made_one:
        made_one.wait_for(lambda: steps_made > saved)
    save_tensors(tensors, path)


def counted_step(self, number, *args):
    global steps_made
    report = step(self, number, *args)
    with made_one:
        steps_made = number + 1
        made_one.notify_all()
    seen.append(["step", number + 1])
    return report


def watched_begin(self, engine, centering, progress, *args):
    begin(self, engine, centering, progress, *args)
    seen.append(["begun", progress.step, [path.name for path in sorted(self.root.glob("*step_*"))]])


def watched_move_on(self, *args):
    written = move_on(self, *args)
    if written:
        seen.append(["written", written.step])
    return written


def main() -> None:
    torch.set_num_threads(1)
    out, whole, held = sys.argv[1:]
    shut_down, distributed.shut_down = distributed.shut_down, lambda: None  # one process group for all runs
    codes = [pipeline.run.loop.train(load_config(whole))]
    checkpoint.save_tensors, Trainer.step = slow_save, counted_step
    checkpoint.Checkpoints.begin, checkpoint.Checkpoints.move_on = watched_begin, watched_move_on
    codes.append(pipeline.run.loop.train(load_config(held)))
    checkpoint.save_tensors = save_tensors
    faulty = list(seen)
    codes.append(pipeline.run.loop.train(load_config(held)))
    shut_down()
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps({"codes": codes, "faulty": faulty}))


if __name__ == "__main__":
    main()
