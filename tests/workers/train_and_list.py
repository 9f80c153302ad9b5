"""Trains on each of some configurations, one after the other: `train_and_list.py LEDGER DIES CONFIG... [KEY=VALUE...]`.

A rank lists in a file of its own, LEDGER.NUMBER.RANK, every image that it trains on, before it does. One that is called
DIES kills itself when it has its second batch. Waits for stores are as short as in the tests of what reads from them.
"""

import json
import os
import signal
import sys
import zlib

import torch

import pipeline.run.loop
from pipeline.config import load_config
from pipeline.data.loader import Loader
from pipeline.data.remote import patience, store
from pipeline.engine import distributed

patience._FIRST_WAIT = 0.005
store._CLIENT["read_timeout"] = store.timedelta(seconds=1)
ledger, dies, *words = sys.argv[1:]
overrides = [word for word in words if "=" in word]
report = Loader._report
batches = 0


def list_images(self: Loader, prepared) -> None:
    global batches
    batches += 1
    rows = zip(prepared.positions.tolist(), prepared.records, map(zlib.crc32, prepared.encoded), strict=True)
    with open(f"{ledger}.{number}.{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(list(rows)) + "\n")
    if dies == os.environ["RANK"] and batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    report(self, prepared)


torch.set_num_threads(1)
Loader._report = list_images
shut_down, distributed.shut_down = distributed.shut_down, lambda: None  # one process group for all runs
number = -1
for config in (word for word in words if "=" not in word):
    number += 1
    code = pipeline.run.loop.train(load_config(config, overrides), quiet=True)
    assert code == 0, code
shut_down()
