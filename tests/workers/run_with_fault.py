"""Train with a fault in one rank: `run_with_fault.py CONFIG FAULT RANK STEP`."""

import ctypes
import os
import sys
import time

from pipeline.config import load_config
from pipeline.method.tri_branch import TriBranch
from pipeline.run import loop
from pipeline.run.slurm_job import stop_signals
from pipeline.run.step import Trainer
from pipeline.run.watchdog import Watchdog

HANGS_AFTER_SECONDS = 30.0


class StrictOnceItSteps(Watchdog):
    """As patient as the config says while ranks start, for which a loaded machine may take minutes."""

    def __init__(self, rank: int, world_size: int, patience_seconds: float, *more):
        super().__init__(rank, world_size, HANGS_AFTER_SECONDS, *more)  # it looks as often as this wants
        self.timeout_seconds = patience_seconds

    def beat(self, phase: str) -> None:
        super().beat(phase)
        if phase == "data of step 2":
            self.timeout_seconds = HANGS_AFTER_SECONDS


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
    if fault != crash.__name__:
        loop.Watchdog = StrictOnceItSteps
    with stop_signals() as received:
        sys.exit(loop.train(load_config(config), quiet=True, stop_requested=received))
