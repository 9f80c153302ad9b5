"""Runs training in forked children.

Usage: training.py CONFIG PLAN, with PLAN a JSON list of attempts, each an object with

    overrides   list of KEY=VALUE
    kill        null, or "start" (kill -9 at once), "steps:N" (once N more lines are logged), "save" (as soon as a
                checkpoint is begun), "signal" (SIGTERM at the first line, sent by the run to itself: it may be through
                before others act), "interrupt" (SIGINT then)
    fork        RUN@STEP
    delay       seconds between that moment and the signal

Prints one JSON list: exit code of every attempt, negative for a signal.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from thin_resnets import thin_resnets

import pipeline.run.loop
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.run.directory import RunDirectory
from pipeline.run.fork import Fork

SIGNALS = {"signal": signal.SIGTERM, "interrupt": signal.SIGINT}


def attempt(config_path: str, plan: dict) -> int:
    config = load_config(config_path, plan.get("overrides", []))
    run = Path(config.run.dir)
    before, left_over = lines(run), begun_saves(run)
    kind, _, count = (plan.get("kill") or "none").partition(":")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if kind in SIGNALS:
            signal_at_the_first_line(SIGNALS[kind])
        code = 1
        try:
            fork = Fork.read(plan["fork"], config.run.dir) if "fork" in plan else None
            code = pipeline.run.loop.train(config, quiet=True, fork=fork)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        finally:
            os._exit(code)
    moment = {
        "start": lambda: True,
        "steps": lambda: lines(run) >= before + int(count or 1),
        "save": lambda: bool(begun_saves(run) - left_over),
    }.get(kind, lambda: False)
    sent = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not sent and moment():
            time.sleep(plan.get("delay", 0.0))
            os.kill(child, signal.SIGKILL)
            sent = True
        time.sleep(0.002)


def signal_at_the_first_line(number: int) -> None:
    log = RunDirectory.log

    def log_and_signal(directory: RunDirectory, record: dict) -> None:
        log(directory, record)
        RunDirectory.log = log
        os.kill(os.getpid(), number)

    RunDirectory.log = log_and_signal


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def begun_saves(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written or were when a run was killed, with the time of their last new file."""
    found = set()
    for path in run.glob("checkpoints/.step_*.tmp"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


if __name__ == "__main__":
    thin_resnets()
    print(json.dumps([attempt(sys.argv[1], plan) for plan in json.loads(sys.argv[2])]))
