"""Runs training in forked children.

Usage: training.py CONFIG PLAN, with PLAN a JSON list of attempts, each an object with

    overrides   list of KEY=VALUE
    kill        null, or "steps:N" (kill -9 once N more lines are logged), "save" (as soon as a checkpoint is begun),
                "signal" (SIGTERM after the first line), "interrupt" (SIGINT then)
    fork        RUN@STEP
    delay       seconds between that moment and the signal

Prints one JSON list: exit code of every attempt, negative for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import pipeline.run.loop
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.run.fork import Fork


def attempt(config_path: str, plan: dict) -> int:
    config = load_config(config_path, plan.get("overrides", []))
    run = Path(config.run.dir)
    before = lines(run)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        code = 1
        try:
            fork = Fork.read(plan["fork"], config.run.dir) if "fork" in plan else None
            code = pipeline.run.loop.train(config, quiet=True, fork=fork)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        finally:
            os._exit(code)
    kind, _, count = (plan.get("kill") or "none").partition(":")
    moment = {
        "none": lambda: False,
        "steps": lambda: lines(run) >= before + int(count or 1),
        "signal": lambda: lines(run) >= before + 1,
        "interrupt": lambda: lines(run) >= before + 1,
        "save": lambda: any(run.glob("checkpoints/.step_*.tmp")),
    }[kind]
    sent = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not sent and moment():
            time.sleep(plan.get("delay", 0.0))
            os.kill(child, {"signal": signal.SIGTERM, "interrupt": signal.SIGINT}.get(kind, signal.SIGKILL))
            sent = True
        time.sleep(0.002)


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


if __name__ == "__main__":
    print(json.dumps([attempt(sys.argv[1], plan) for plan in json.loads(sys.argv[2])]))
