"""The Slurm job that a run belongs to: how it is told to stop, and what it tells its batch script."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.launch import number_of
from pipeline.files import write_atomically


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1, SIGINT and SIGHUP (a terminal that is gone) instead of dying of them; the list is empty
    until one arrives.

    Enter it before the slow imports, so that no signal is lost to them. Python runs handlers in the main thread only,
    between two of its instructions, so whatever is being written is finished first, however many signals come. Only a
    second SIGINT ends the process at once, wherever it is.
    """
    received: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell ignores one for what it starts in the background, nohup one
        if signal.getsignal(number) is not signal.SIG_IGN:
            numbers.append(number)

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if speaks_for_all():
                os.write(2, b"\ninterrupted: saving after this step; once more ends it at once\n")

    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def speaks_for_all() -> bool:
    """Whether this process is rank 0, as far as its launcher says."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


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
        """The job around this process, if there is one.

        Raises:
            UserError: how often it was requeued is no number.
        """
        environ = os.environ
        if "SLURM_JOB_ID" not in environ:
            return None
        directory = environ.get("POA_JOB_DIR")
        attempt = number_of("SLURM_RESTART_COUNT", 0)
        return cls(environ["SLURM_JOB_ID"], attempt, Path(directory) if directory else None)

    @property
    def name(self) -> str:
        """What tells this attempt from all others."""
        return f"{self.id}.{self.attempt}"

    def saved(self, step: int) -> None:
        """A checkpoint exists: if this attempt fails, another one is worth it."""
        self._tell("progress", str(step))

    def ended(self, how: str) -> None:
        """The run ends: `done`, `stopped`, `stay` (stopped, and not to be requeued), `try again` or `give up`."""
        self._tell(f"end.{self.attempt}", how)

    def _tell(self, name: str, text: str) -> None:
        """The job script then knows less, which must not end a run."""
        if self.directory is None:
            return
        try:
            write_atomically(self.directory / name, text + "\n")
        except OSError as error:
            print(f"warning: cannot tell the job script {text!r}: {error}", file=sys.stderr)
