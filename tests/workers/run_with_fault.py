"""Train with a fault in one rank: `run_with_fault.py CONFIG FAULT RANK STEP`."""

import ctypes
import os
import sys
import time

from pipeline.config import load_config
from pipeline.method.tri_branch import TriBranch
from pipeline.run.loop import train
from pipeline.run.slurm_job import stop_signals
from pipeline.run.step import Trainer


def crash() -> None:
    raise ZeroDivisionError("the fault of this test")


def fall_asleep() -> None:
    time.sleep(600)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)  # without releasing the lock that every Python thread needs


def at_step(fault, rank: int, step: int) -> None:
    """Run `fault` in one rank while it computes the teacher of a step, where the other waits in Sinkhorn."""
    current, teacher, run = [0], TriBranch.teacher_targets, Trainer.step

    def remember(self, number, *args):
        current[0] = number + 1
        return run(self, number, *args)

    def disturb(self, *args):
        if current[0] == step and int(os.environ["RANK"]) == rank:
            fault()
        return teacher(self, *args)

    Trainer.step, TriBranch.teacher_targets = remember, disturb


if __name__ == "__main__":
    config, fault, rank, step = sys.argv[1:]
    at_step({f.__name__: f for f in (crash, fall_asleep, hold_the_interpreter)}[fault], int(rank), int(step))
    with stop_signals() as received:
        sys.exit(train(load_config(config), quiet=True, stop_requested=received))
