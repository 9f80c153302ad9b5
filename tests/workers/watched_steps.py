"""Trains some steps per config in one process and writes what was seen: watched_steps.py OUT STEPS CONFIG..."""

import hashlib
import json
import sys
from pathlib import Path

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.run.step import Trainer


def watch(path: Path, ranks: distributed.Ranks, steps: int) -> dict:
    trainer = Trainer(load_config(path), ranks)
    trainer.start_data(0)
    seen = []
    for step in range(steps):
        report = trainer.step(step).report
        health = {slot: branch._asdict() for slot, branch in (report.health.branches if report.health else {}).items()}
        seen.append({"losses": report.agreed.losses, "health": health, "flops": report.agreed.flops})
    digest = hashlib.sha256()
    for group in trainer.engine.groups:
        for vector in (group.master, group.ema):
            digest.update(vector.detach().numpy().tobytes())
    phases = dict(trainer.phases.seconds)
    trainer.close()
    return {"steps": seen, "weights": digest.hexdigest(), "phases": phases}


if __name__ == "__main__":
    world = distributed.initialize()
    results = {Path(path).stem: watch(Path(path), world, int(sys.argv[2])) for path in sys.argv[3:]}
    Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.shut_down()
