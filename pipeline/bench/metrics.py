"""What metrics cost a training, one process in a temporary directory.

CPU seconds are those of the training thread, which other load on the machine does not change much. Wall time drifts
with that load, so that disturbances alternate with quiet blocks in many rounds, and each is held against the quiet
blocks before and after it. On a CPU start it with OMP_NUM_THREADS=1, so that this thread does all the work of a step.
"""

import os
import signal
import socket
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Progress
from pipeline.files import write_atomically
from pipeline.measure.health import Probe
from pipeline.monitor.monitor import Monitor
from pipeline.run.step import Trainer

STORM_PER_SECOND = 50
FIRST_STEP = 1000


class Spent:
    """CPU seconds of this thread inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed


@contextmanager
def nothing(monitor: Any) -> Iterator[None]:
    yield


@contextmanager
def scrape_storm(monitor: Any) -> Iterator[None]:
    """Scrapes from another process, as fast as a misconfigured server might."""
    with _children(_storm, monitor._exporter.port):
        yield


@contextmanager
def slow_scraper(monitor: Any) -> Iterator[None]:
    """A client that asks and then reads a byte a second."""
    with _children(_dawdle, monitor._exporter.port):
        yield


@contextmanager
def dead_endpoint(monitor: Any) -> Iterator[None]:
    """The endpoint is killed."""
    os.kill(monitor._exporter._process.pid, signal.SIGKILL)
    yield


@contextmanager
def _children(act: Callable[[int], None], port: int) -> Iterator[None]:
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=act, args=(port,), daemon=True)
    child.start()
    time.sleep(2)  # until it has started
    try:
        yield
    finally:
        child.terminate()
        child.join()


def _storm(port: int) -> None:
    def scrape() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            answer.read()

    while True:
        threading.Thread(target=scrape).start()
        time.sleep(1 / STORM_PER_SECOND)


def _dawdle(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while connection.recv(1):
            time.sleep(1)


def benchmark_metrics(config: ExperimentConfig, steps: int, rounds: int) -> dict[str, Any]:
    """Train in blocks of some steps, disturbed ones between quiet ones, for some rounds.

    Returns:
        The share of metrics in the training thread's CPU time, and by disturbance the wall time of a step against that
        of its quiet neighbours, minus 1: smallest, median and largest of the rounds.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"dir": directory}),
                "metrics": config.metrics.model_copy(update={"port": 0}),
            }
        )
        write_atomically(Path(directory) / "manifest.json", '{"starts": [{}], "code": "bench"}')
        ranks = distributed.initialize()
        trainer = Trainer(config, ranks)
        trainer.start_data(0)
        progress = Progress(0, 0, {}, 0, {})
        spent = Spent()
        spent.wrap(Probe, "teacher", "student", "reduce")
        spent.wrap(trainer.phases, "start", "waited_for_data", "lap")
        trainer.tri_branch.lap = trainer.phases.lap
        with Monitor(config, ranks, trainer.phases, trainer.bands, progress, 10**9, trainer.loader.tally) as monitor:
            spent.wrap(monitor, "step", "log", "logged")
            run = partial(_block, trainer, monitor, progress, config.run.log_every_steps, steps)
            run(nothing)  # warm up
            while monitor._exporter is None or monitor._exporter.port is None:
                run(nothing)
            spent.seconds = 0.0
            cpu, wall = run(nothing)
            total, quiet = sum(cpu), statistics.median(wall)
            ratios: dict[str, list[float]] = {}
            kinds = {
                "nothing": nothing,
                f"{STORM_PER_SECOND} scrapes a second": scrape_storm,
                "a scraper that reads a byte a second": slow_scraper,
            }
            for name, disturb in [*kinds.items()] * rounds + [("endpoint killed", dead_endpoint)]:
                cpu, wall = run(disturb)
                cpu_after, wall_after = run(nothing)
                total, after = total + sum(cpu) + sum(cpu_after), statistics.median(wall_after)
                ratios.setdefault(name, []).append(2 * statistics.median(wall) / (quiet + after))
                quiet = after
        trainer.close()
        distributed.shut_down()
    return {
        "cpu_share": spent.seconds / total,
        "slowdown": {
            name: {"min": min(found) - 1, "median": statistics.median(found) - 1, "max": max(found) - 1}
            for name, found in ratios.items()
        },
        "rounds": rounds,
        "steps": steps,
    }


def _block(
    trainer: Any, monitor: Any, progress: Any, log_every: int, steps: int, disturb: Callable[[Any], Any]
) -> tuple[list[float], list[float]]:
    """CPU and wall seconds of each step, metrics included."""
    cpu, wall = [], []
    progress.step = FIRST_STEP  # every block trains the same sub-networks
    with disturb(monitor):
        for _ in range(steps):
            began, thread = time.perf_counter(), time.thread_time()
            step = trainer.step(progress.step)
            report = step.report
            progress.step += 1
            progress.samples = step.samples
            monitor.step(progress, report)
            if progress.step % log_every == 0:
                monitor.logged(
                    {"step": progress.step, "time": time.time(), **monitor.log(report), **report.agreed.losses}
                )
            cpu.append(time.thread_time() - thread)
            wall.append(time.perf_counter() - began)
    return cpu, wall
