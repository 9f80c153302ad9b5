"""Ends a process that stops writing to a pipe: `python deadman.py PID PERIOD_SECONDS LIMIT_SECONDS < PIPE`.

The watchdog starts it as a process of its own, for the case that native code holds the interpreter, in which none of
its threads can run. A timer within the process could not tell a hang from a process that was stopped (SIGSTOP, a
suspended job) and woke up late; this one counts its own periods, and none while the other is stopped.
"""

import contextlib
import os
import select
import signal
import sys
import time


def watch(pid: int, period: float, limit: float) -> None:
    """Return when the process is gone, or once it has been ended."""
    silent = 0.0
    while os.getppid() == pid:
        if select.select([0], [], [], period)[0]:
            if not os.read(0, 4096):
                return
            silent = 0.0
        elif _state(pid) in "Tt":
            silent = 0.0
        else:
            silent += period
        if silent > limit:
            print(f"error: process {pid} hangs in native code that holds the interpreter", file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGABRT)  # faulthandler prints its stacks
            for _ in range(50):
                if os.getppid() != pid:  # it has ended; who reads what it printed waits for this process, too
                    return
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """One letter: `T` is stopped, `t` is held by a debugger."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # they are meant for the other
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # it is gone
        watch(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
