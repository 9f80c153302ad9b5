"""A run in a job of the cluster, as tests watch it: what it has done so far, and what becomes of a fault."""

import contextlib
import itertools
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from slurm_cluster import FINAL, Job

SAVE_EVERY = 10
AGREED = ("loss", "lr", "momentum", "grad_norm", "subnet", "images")


def read_records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Run:
    """A run and the job that it is in.

    Attributes:
        begun: how long the log was when the latest fault began.
    """

    def __init__(self, job: Job, directory: Path, expected: list[dict]):
        self.job, self.directory, self.expected, self.begun = job, directory, expected, 0

    @property
    def steps(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def saved(self) -> int:
        path = self.directory / "checkpoints" / "latest"
        return int(path.read_text()[len("step_") :]) if path.exists() else 0

    @property
    def restarts(self) -> int:
        return int(self.job.field("Restarts") or 0)

    @property
    def said(self) -> str:
        """What the job has logged since the latest fault began."""
        return self.job.log[self.begun :]

    def reaches(self, step: int) -> None:
        """So many steps are made, and the checkpoint that was due on the way is complete."""
        there = lambda: self.steps >= step and self.saved >= step // SAVE_EVERY * SAVE_EVERY  # noqa: E731
        looks = itertools.count(1)  # the files are looked at often: while the controller is asked, the run goes on
        self.job.until(lambda: there() or (next(looks) % 100 == 0 and self.job.field("JobState") in FINAL), every=0.05)
        assert there(), self.job.log[-6000:]

    def makes_steps(self) -> None:
        """Five in this attempt."""
        self.reaches(self._began_at() + 5)

    def saves(self) -> None:
        """Five steps at least in this attempt, a checkpoint among them, and more since that one."""
        began = self._began_at()
        self.reaches(max(began + 5, (began // SAVE_EVERY + 1) * SAVE_EVERY + 2))

    def _began_at(self) -> int:
        return [0, *_resumed_at(self.job.log)][-1]

    @contextlib.contextmanager
    def next_attempt(self, stops: bool, asks: bool | None = None) -> Iterator[None]:
        """What is done within this context is to end an attempt; waits for the next one.

        Args:
            stops: whether the run saves and stops, so that nothing is lost; else it goes on from its last checkpoint.
            asks: whether the batch script asks Slurm for the next attempt; None where either may be.
        """
        made, saved = self.steps, self.saved
        self.begun = len(self.job.log)
        yield
        self.job.until(self.resumed_at)
        (resumed,) = self.resumed_at()
        if stops:
            assert self.stopped_at() == [resumed]
            assert resumed >= made
        else:
            assert not self.stopped_at()
            assert resumed % SAVE_EVERY == 0  # since the last checkpoint, no more
            assert resumed >= saved
        assert asks is None or self.said.count("requeueing") == asks

    def pause(self) -> list[int]:
        """Stop the processes of both ranks; gives their pids."""
        pids = [pid for rank in (0, 1) for pid in self.job.tasks(rank)]
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def is_complete(self) -> None:
        """Every step is there once, with the values of the undisturbed run to the last bit."""
        records = read_records(self.directory)
        assert [r["step"] for r in records] == [r["step"] for r in self.expected]
        for record, wanted in zip(records, self.expected, strict=True):
            assert {key: record[key] for key in AGREED} == {key: wanted[key] for key in AGREED}

    def resumed_at(self) -> list[int]:
        """Since the latest fault began."""
        return _resumed_at(self.said)

    def stopped_at(self) -> list[int]:
        """Since the latest fault began."""
        return [int(step) for step in re.findall(r"stopped on a signal after saving step (\d+)", self.said)]


def _resumed_at(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming .* at step (\d+)", log)]
