"""Who may write into a run directory: one process at a time, and a later attempt of a job before an earlier one."""

import fcntl
import json
import os
import platform
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.run.slurm_job import Job

_TAKE_OVER_SECONDS = 120.0
_LOOK_SECONDS = 5.0  # between two looks at who owns the run; the file may be on a busy shared file system
STALE_SECONDS = 60.0
"""An owner file that nobody renews for so long, while another process watches, is of a process that is gone."""

_RENEW_SECONDS = 10.0


class Lock(Protocol):
    """Held by one process at a time; one that wants it tries for so many seconds."""

    patience_seconds: float

    def acquire(self) -> bool: ...

    def release(self) -> None: ...


class Ownership:
    """A run directory's lock, and `.owner`, which names the process that may write.

    Args:
        directory: of the run, which exists.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._owner = directory / ".owner"
        self._lock: Lock | None = None
        self._name = ""
        self._next_look = 0.0

    def claim(self, job: Job | None) -> None:
        """Take the directory for this process.

        A later attempt of a Slurm job takes it over from an earlier one: when only the daemon of a node dies, Slurm
        requeues the job while its old processes train on.

        Raises:
            UserError: another process trains here.
        """
        self._name = job.name if job else f"{platform.node()}.{os.getpid()}"
        self._lock = open_lock(self.directory)
        takes_over = self._owner_is_earlier_attempt(job)
        patience = max(self._lock.patience_seconds, _TAKE_OVER_SECONDS if takes_over else 0.0)
        began = time.monotonic()
        while not self._lock.acquire():
            if time.monotonic() >= began + patience:
                self.release()
                raise UserError(
                    f"another process is training here ({_read(self._owner) or 'of unknown name'})",
                    str(self.directory),
                    "stop it, or choose another run directory",
                )
            if takes_over:
                write_atomically(self._owner, self._name + "\n")
            time.sleep(0.5)
        write_atomically(self._owner, self._name + "\n")

    def require(self) -> None:
        """Stop a process whose run was taken over, before it writes into what is no longer its own.

        Raises:
            RuntimeError: the directory has another owner.
        """
        owner = _read(self._owner)
        if owner != self._name:
            raise RuntimeError(f"{self.directory} was taken over by {owner}: this process must not write to it")

    def notice(self) -> None:
        """`require` for every step: it looks now and then, and a file that cannot be read names no other owner.

        Raises:
            RuntimeError: the directory has another owner.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        with suppress(OSError):
            if _read(self._owner):
                self.require()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _owner_is_earlier_attempt(self, job: Job | None) -> bool:
        id_, _, attempt = _read(self._owner).rpartition(".")
        return job is not None and id_ == job.id and attempt.isdigit() and int(attempt) < job.attempt


def open_lock(directory: Path) -> Lock:
    """What locks this directory: `flock`, or an owner file where the file system has no locks.

    Raises:
        OSError: nothing can be written there.
    """
    if locks_work(directory):
        return Flock(directory / ".lock")
    print(
        f"note: {directory} is on a file system without locks: .lock.owner keeps other processes out, and is taken "
        f"over when nobody has renewed it for {STALE_SECONDS:.0f} s",
        file=sys.stderr,
    )
    return OwnerFile(directory / ".lock.owner")


def locks_work(directory: Path) -> bool:
    """Whether `flock` works in a directory (Lustre wants a mount option for it, NFS a daemon).

    Nobody else knows the file that is tried, so any refusal means that there are no locks; file systems have many words
    for it.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".lock.") as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


class Flock:
    """The operating system's lock, which goes with the process."""

    patience_seconds = 0.0

    def __init__(self, path: Path):
        self._file = open(path, "w")  # noqa: SIM115 - held until the process ends

    def acquire(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on network file systems that make byte ranges of it
            return False
        return True

    def release(self) -> None:
        self._file.close()


class OwnerFile:
    """A file that only one process can create, and that it renews as long as it lives.

    It is stale if its process was on this machine and is gone, or if it was not renewed for `STALE_SECONDS` by the
    clock of the process that wants it, so that clocks need not agree.
    """

    patience_seconds = STALE_SECONDS + _RENEW_SECONDS

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[str, float] | None = None
        self._released = threading.Event()
        self._renewing: threading.Thread | None = None
        self._text = ""

    def acquire(self) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                self._text = self._words()
                file.write(self._text)
        except FileExistsError:
            return self._take_if_stale() and self.acquire()
        self._renewing = threading.Thread(target=self._renew, name="owner file", daemon=True)
        self._renewing.start()
        return True

    def release(self) -> None:
        """Remove the file if it is ours."""
        self._released.set()
        if self._renewing is not None:
            self._renewing.join()
            if _read(self.path) == self._text:
                self.path.unlink(missing_ok=True)

    def _words(self) -> str:
        own = {"host": platform.node(), "pid": os.getpid(), "machine": _machine(), "renewed": time.time()}
        return json.dumps(own | {"started": _process_start(os.getpid())})

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                if _read(self.path) != self._text:  # taken over while this process was stopped
                    return
                words = self._words()
                write_atomically(self.path, words)
                self._text = words
            except OSError as error:
                print(f"warning: cannot renew {self.path}: {error}", file=sys.stderr)

    def _take_if_stale(self) -> bool:
        """Whether the file is gone now, because its owner was."""
        text = _read(self.path)
        if self._seen is None:
            print(f"note: looking for {self.patience_seconds:.0f} s whether its owner is alive", file=sys.stderr)
        if self._seen is None or self._seen[0] != text:
            self._seen = (text, time.monotonic())
        if time.monotonic() - self._seen[1] < STALE_SECONDS and not _is_gone(text):
            return False
        aside = self.path.with_name(f"{self.path.name}.{platform.node()}.{os.getpid()}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True
        if _read(aside) != text:  # another process was faster
            os.rename(aside, self.path)
            return False
        aside.unlink()
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _is_gone(text: str) -> bool:
    """Whether an owner file is of a process of this machine that has ended."""
    try:
        owner: dict[str, Any] = json.loads(text)
        return owner["machine"] == _machine() and owner["started"] != _process_start(owner["pid"])
    except (ValueError, KeyError, TypeError):  # half written: its owner is at work, or it will grow old
        return False


def _machine() -> str:
    """What tells this machine's process numbers from those of another, or of another container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _process_start(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""
