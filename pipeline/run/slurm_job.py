"""The Slurm job that a run belongs to: how it is told to stop, and what it tells its batch script."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import write_atomically


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGUSR1 instead of dying of them; the list is empty until one arrives.

    Enter it before the slow imports, so that no signal is lost to them. Python runs handlers in the main thread only,
    between two of its instructions, so whatever is being written is finished first, however many signals come.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _frame: received.append(n))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Job:
    """One attempt of a Slurm job.

    Attributes:
        id: as Slurm prints it, tasks of arrays included.
        attempt: how often it was requeued.
        directory: where slurm/common.sh looks for what became of the run; None if another script launched it.
    """

    id: str
    attempt: int
    directory: Path | None

    @classmethod
    def from_environment(cls) -> "Job | None":
        environ = os.environ
        if "SLURM_JOB_ID" not in environ:
            return None
        directory = environ.get("POA_JOB_DIR")
        attempt = int(environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(environ["SLURM_JOB_ID"], attempt, Path(directory) if directory else None)

    @property
    def name(self) -> str:
        """What tells this attempt from all others."""
        return f"{self.id}.{self.attempt}"

    def saved(self, step: int) -> None:
        """A checkpoint exists: if this attempt fails, another one is worth it."""
        self._tell("progress", str(step))

    def stopped(self, requeue: bool) -> None:
        """The run ends on a signal, with everything saved."""
        self._tell(f"stopped.{self.attempt}", "requeue" if requeue else "stay")

    def complete(self) -> None:
        self._tell("done", "")

    def _tell(self, name: str, text: str) -> None:
        if self.directory is not None:
            write_atomically(self.directory / name, text + "\n")
