"""Runs a script as several ranks.

Imports take a rank longer than what most tests want of it, so ranks are forked from a process that has imported
everything. They are on the CPU: a machine may have fewer GPUs than ranks. What a GPU is for runs in pytest's process.
"""

import ctypes
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["preloaded"])
_FRESH = multiprocessing.get_context("spawn")

ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def gpus() -> int:
    """CUDA devices of this machine, without importing torch."""
    count = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_fork_server() -> None:
    """Start the process from which ranks are forked, if it is not there yet.

    In the main thread alone: the environment is changed for it, and other threads may be starting processes.
    """
    # DeepSpeed chooses its device once, when it is imported there; the path is how that process finds what to import
    with mock.patch.dict(os.environ, ON_CPU | {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}):
        forkserver.ensure_running()


def run_ranks(
    script: Path, ranks: int, arguments: list[str], directory: Path, timeout: float, fresh: bool = False
) -> list[str]:
    """What each rank printed.

    Args:
        script: run as `__main__`.
        ranks: how many processes.
        arguments: of the script.
        directory: an empty one, where the ranks work.
        timeout: seconds until they are killed.
        fresh: import everything anew, for environment variables that are read at import.

    Raises:
        AssertionError: a rank failed, or was not done in time; with the end of what it printed.
    """
    files = [directory / f"rank{rank}.out" for rank in range(ranks)]
    processes = start_ranks(script, arguments, directory, files, fresh)
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    outputs = [file.read_text(errors="replace") for file in files]
    failed = [f"rank {i}: exit code {code}\n{outputs[i][-4000:]}" for i, code in enumerate(codes) if code != 0]
    assert not failed, "\n".join(failed)
    return outputs


def start_ranks(
    script: Path, arguments: list[str], directory: Path, files: list[Path], fresh: bool = False
) -> list[BaseProcess]:
    """Start a rank for each file, to which it writes what it prints; the other arguments are those of `run_ranks`.

    `start_fork_server` comes first, unless `fresh`.
    """
    ranks = len(files)
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port()}
    shared |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, **ON_CPU}
    # a variable may go while another thread starts ranks: pytest has one for the test that is running
    inherited = {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}
    context, processes = _FRESH if fresh else _FORKS, []
    for rank, file in enumerate(files):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        words = (script, arguments, {**inherited, **own}, directory, file, fresh)
        processes.append(context.Process(target=_be_rank, args=words))
        processes[-1].start()
    return processes


def _be_rank(
    script: Path, arguments: list[str], environment: dict[str, str], directory: Path, output: Path, fresh: bool
) -> None:
    import torch

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), str(ROOT)]
    torch.set_num_threads(1)
    assert fresh or "preloaded" in sys.modules, "the process from which ranks are forked could not import it"
    runpy.run_path(str(script), run_name="__main__")
