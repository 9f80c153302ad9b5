"""What a rank of a run reads, without training: `read_share.py FOLDER`, in which `job-RANK.json` says what.

It reads `batches` global batches from `sample` on and appends to its ledger, after each, a line with the records and
checksums of the images. Before each it waits until the cache holds what it should hold by then, so that what is fetched
does not depend on how fast this machine is. A rank that is to die kills itself in the midst of its batch `dies_at`.
"""

import json
import os
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.reading import Reading
from pipeline.data.remote import patience, store

patience._FIRST_WAIT = 0.005
store._CLIENT["read_timeout"] = store.timedelta(seconds=1)
job = json.loads(Path(sys.argv[1], f"job-{os.environ['RANK']}.json").read_text())
os.environ.update(job["environment"])
data = DataConfig.model_validate(job["data"])
reading = Reading(data, job["rank"], job["world_size"])
cache = reading.cache


def wait_for(ready) -> None:
    while not ready():
        time.sleep(0.01)


def is_here() -> bool:
    return cache._planned is cache._wish and not any(cache._is_due(n, cache._wishes()) for n in cache._wish)


for batch in range(job["batches"]):
    sample = job["sample"] + batch * data.batch_size * job["world_size"]
    reading.want(sample)
    if batch == 0:
        wait_for(lambda: cache._planned is cache._wish)
        Path(f"{job['ledger']}.begun").touch()
        wait_for(lambda: all(Path(f"{other}.begun").exists() for other in job["on_node"]))
    if batch == job["dies_at"]:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
    wait_for(is_here)
    positions = reading.positions(sample).tolist()
    picked = reading.pick(positions)
    if batch == job["dies_at"]:
        signal.pause()
    lines = [[p, one.record, zlib.crc32(one.data)] for p, one in zip(positions, picked, strict=True)]
    with open(job["ledger"], "a") as ledger:
        ledger.write(json.dumps(lines) + "\n")
reading.close()
