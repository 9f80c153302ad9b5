"""Load ten batches of SHARD..., with a signal in each; prints how many were caught and how many samples were taken."""

import os
import signal
import sys

from pipeline.config import DataConfig
from pipeline.data.loader import Loader

caught = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: caught.append(number))
crops = {"global_crops": {"size": 32}, "local_crops": {"count": 1, "size": 16}}
loader = Loader(DataConfig.model_validate({"train": sys.argv[1:], "batch_size": 4, "threads": 2, **crops}))
for i in range(10):
    next(loader)
    os.kill(os.getpid(), (signal.SIGTERM, signal.SIGUSR1)[i % 2])
loader.close()
print(len(caught), loader.next_sample)
