"""Two steps of a rank that may allocate so many bytes beside its libraries: `limited_memory.py CONFIG BYTES`."""

import ctypes
import resource
import sys
from pathlib import Path

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.run.step import Trainer


def data_bytes() -> int:
    """Private memory that this process asked for: what the limit counts."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmData"].split()[0]) * 1024


M_MMAP_THRESHOLD = -3  # of malloc.h
# freed memory goes back to the system, and counts no more
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024) == 1
config, budget = load_config(sys.argv[1]), int(sys.argv[2])
ranks = distributed.initialize()
limit = data_bytes() + budget
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
trainer = Trainer(config, ranks)
trainer.start_data(0)
for step in range(2):
    trainer.step(step)
print(f"{limit - data_bytes()} bytes were left")
trainer.close()
distributed.shut_down()
