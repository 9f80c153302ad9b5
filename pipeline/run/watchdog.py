"""Ends a process that has stopped making steps, saying which rank stopped, in which phase and with which stack.

Every rank counts its beats, which all ranks make in the same order, and the collectives that it has begun, and writes
both now and then to a file of its own in the run directory. When a rank has waited too long it reads the others' files:
a file that nobody writes any more is of a process that was stopped or lost; otherwise the rank with the fewest beats is
the one that all wait for, among equals the one with the fewest collectives, and among equals again the one whose stack
is not within a collective. (Under NCCL ranks wait wherever they next want a result, so that stacks alone would not do.)

Only time in which the watchdog's own thread ran is counted: a process that was stopped, or whose job or machine was
suspended, has not hung.
"""

import faulthandler
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_WAITING = (
    os.path.join("torch", "distributed"),
    os.path.join("engine", "flight.py"),
)  # files of frames that wait for ranks
_DEADMAN = Path(__file__).with_name("deadman.py")
_GRACE_SECONDS = 5.0  # for the words of the rank that hangs, before the others end the job


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself.

    Attributes:
        beats: phases it has entered since it started.
        collectives: that it has begun since then.
        phase: the one it is in.
        silent_seconds: for how long it had been there when it wrote this.
        written: when it wrote this, seconds since 1970.
        stack: of its main thread at that time.
    """

    rank: int
    host: str
    pid: int
    beats: int
    collectives: int
    phase: str
    silent_seconds: float
    written: float
    stack: str


class Watchdog:
    """Exits with code 1 if no beat comes for `timeout_seconds`.

    A hung collective cannot be interrupted from Python, so the process is ended from a thread of its own; where even
    that thread cannot run, because native code holds the interpreter, another process ends it (`deadman`).

    Args:
        rank: of this process.
        world_size: how many there are.
        timeout_seconds: how long a phase may last.
        collectives: how many this rank has begun so far.
        waiting: what outside of the process it waits for, as to be said beside the phase; empty for nothing.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        collectives: Callable[[], int] = lambda: 0,
        waiting: Callable[[], str] = lambda: "",
    ):
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.period_seconds = min(max(timeout_seconds / 10, 0.2), 60.0)
        self._collectives, self._waiting = collectives, waiting
        self._main = threading.get_ident()
        self._beats, self._phase = 0, "start"
        self._since = self._looked = time.monotonic()
        self._silent_seconds = 0.0
        self._directory: Path | None = None
        self._cannot_write = False
        self._done = threading.Event()
        self._deadman = self._start_deadman()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def share(self, directory: Path) -> None:
        """Write heartbeats to, and read the other ranks' from, a directory that `clear` has made."""
        self._directory = directory
        self._write()

    def beat(self, phase: str) -> None:
        """Note that the process is alive and what it does next; all ranks beat in the same order."""
        self._beats, self._phase = self._beats + 1, phase
        self.alive()

    def alive(self) -> None:
        """Note that the phase gets on; ranks need not do so alike."""
        self._since, self._silent_seconds = time.monotonic(), 0.0

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        if self._deadman is not None and self._deadman.stdin is not None:
            self._deadman.stdin.close()
            self._deadman.wait()

    def _watch(self) -> None:
        while not self._done.wait(self.period_seconds):
            self._tell_deadman()
            self._silent_seconds += self._unseen()
            self._looked = time.monotonic()
            self._write()
            if self._silent_seconds > self.timeout_seconds:
                self._end()

    def _unseen(self) -> float:
        """Seconds of silence since the thread last looked; if those are many more than it waits, it did not run."""
        return min(time.monotonic() - max(self._looked, self._since), 2 * self.period_seconds)

    def _start_deadman(self) -> "subprocess.Popen[bytes] | None":
        limit = self.timeout_seconds + _GRACE_SECONDS
        words = [sys.executable, "-I", "-S", str(_DEADMAN), *map(str, (os.getpid(), self.period_seconds, limit))]
        try:
            deadman = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            print(f"warning: rank {self.rank} runs without its deadman: {error}", file=sys.stderr)
            return None
        assert deadman.stdin is not None
        os.set_blocking(deadman.stdin.fileno(), False)
        faulthandler.enable(file=2)  # when the deadman aborts this process
        return deadman

    def _tell_deadman(self) -> None:
        if self._deadman is not None and self._deadman.stdin is not None:
            with suppress(OSError):  # it ended, or it is stopped
                os.write(self._deadman.stdin.fileno(), b".")

    def _own(self) -> Heartbeat:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        waiting = self._waiting()
        return Heartbeat(
            self.rank,
            platform.node(),
            os.getpid(),
            self._beats,
            self._collectives(),
            f"{self._phase}, {waiting}" if waiting else self._phase,
            self._silent_seconds + self._unseen(),
            time.time(),
            stack,
        )

    def _write(self) -> None:
        if self._directory is None:
            return
        aside = self._directory / f".rank_{self.rank:05d}"
        try:
            aside.write_text(json.dumps(asdict(self._own())), encoding="utf-8")
            os.replace(aside, self._directory / f"rank_{self.rank:05d}.json")
        except OSError as error:  # a full disk must not end what the watchdog is for
            if not self._cannot_write:
                print(f"warning: rank {self.rank} cannot write its heartbeat: {error}", file=sys.stderr)
            self._cannot_write = True
        else:
            self._cannot_write = False

    def _end(self) -> None:
        own = self._own()
        heartbeats = [own, *(read_heartbeats(self._directory, self.world_size, self.rank) if self._directory else [])]
        stopped = find_stopped(heartbeats, 3 * self.period_seconds + 1)
        waiting = [h.rank for h in heartbeats if h not in stopped]
        if own in stopped or self.world_size == 1:
            _say(f"rank {self.rank} of {self.world_size} hangs: {own.silent_seconds:.0f} s in {own.phase}")
            faulthandler.dump_traceback(file=2, all_threads=True)
        elif not stopped:
            if self.rank == min(waiting):
                _say(f"all {self.world_size} ranks wait for each other: {own.silent_seconds:.0f} s in {own.phase}")
                faulthandler.dump_traceback(file=2, all_threads=True)
            time.sleep(_GRACE_SECONDS)
        else:
            if self.rank == min(waiting):
                _report(stopped, own, self.world_size)
            time.sleep(_GRACE_SECONDS)
        os._exit(1)


def clear(directory: Path) -> None:
    """Forget the heartbeats of an earlier start."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def read_heartbeats(directory: Path, world_size: int, besides: int) -> list[Heartbeat]:
    """What the other ranks last wrote; those that never wrote are left out."""
    found = []
    for rank in range(world_size):
        path = directory / f"rank_{rank:05d}.json"
        if rank != besides and path.exists():
            found.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def find_stopped(heartbeats: list[Heartbeat], stale_seconds: float) -> list[Heartbeat]:
    """The ranks that the others wait for; none if nothing tells them apart.

    Args:
        heartbeats: one per rank, the newest written just now.
        stale_seconds: a process writes more often than this.
    """
    now = max(h.written for h in heartbeats)
    stale = [h for h in heartbeats if now - h.written > stale_seconds]
    if stale:
        return stale
    fewest = min(h.beats for h in heartbeats)
    behind = [h for h in heartbeats if h.beats == fewest]
    if len(behind) == len(heartbeats):
        fewest = min(h.collectives for h in heartbeats)
        behind = [h for h in heartbeats if h.collectives == fewest]
    if len(behind) == len(heartbeats):
        behind = [h for h in heartbeats if not any(file in h.stack for file in _WAITING)]
    return behind if len(behind) < len(heartbeats) else []


def _report(stopped: list[Heartbeat], own: Heartbeat, world_size: int) -> None:
    first = stopped[0]
    where = f"{first.host}, process {first.pid}"
    age = own.written - first.written
    more = f"; so do {len(stopped) - 1} more" if len(stopped) > 1 else ""
    _say(
        f"rank {first.rank} of {world_size} ({where}) stopped: last seen {age:.0f} s ago in {first.phase}; "
        f"rank {own.rank} waits in {own.phase} for {own.silent_seconds:.0f} s{more}\n"
        f"Last known stack of rank {first.rank}:\n{first.stack}"
    )


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
