"""As `torchrun --standalone --nproc-per-node RANKS SCRIPT ...`, whose ranks are forks of this process.

Usage: forked_torchrun.py RANKS SCRIPT ARGUMENT...; the last line that it prints is torchrun's exit code.
"""

import os
import runpy
import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def be_rank(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    ranks, *words = sys.argv[1:]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # this process is no rank
        del os.environ[name]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, be_rank)(*words)
        code = 0
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = 1
    print(code)


if __name__ == "__main__":
    main()
