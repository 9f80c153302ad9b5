"""A real Prometheus that scrapes a real two-rank run."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launcher import start_fork_server, start_ranks

from pipeline.monitor.discovery import run_label

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "yaml" / "monitoring"
TRAIN = ROOT / "tests" / "workers" / "unhurried.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def promtool() -> Callable[..., subprocess.CompletedProcess]:
    """Run Prometheus's own tester of rules in `cwd`; both of its streams are in `stdout`."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")

    def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(["promtool", *args], cwd=cwd, timeout=120, check=False, **streams)

    return run


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "it") -> Any:
    """Wait for something that another process does."""
    limit = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < limit, f"{what} never happened"
        time.sleep(0.1)
    return result


@pytest.fixture
def wait() -> Callable[..., Any]:
    return until


@dataclass
class Live:
    """A run in progress, and the Prometheus that watches it."""

    url: str
    run_dir: Path
    targets: Path
    ranks: list[BaseProcess]

    @property
    def label(self) -> str:
        return run_label(self.run_dir)

    def query(self, expr: str) -> dict[str, Any]:
        try:
            url = f"{self.url}/api/v1/query?" + urllib.parse.urlencode({"query": expr})
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def result(self, expr: str) -> list[dict[str, Any]]:
        return self.query(expr).get("data", {}).get("result", [])


def stop(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(60)
        rank.kill()


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a Prometheus with the project's own configuration, and the directory that it watches for targets."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    home = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(MONITORING, home, dirs_exist_ok=True)
    config = (home / "prometheus.yaml").read_text()
    hurried = config.replace("interval: 15s", "interval: 2s").replace("timeout: 10s", "timeout: 2s")
    (home / "prometheus.yaml").write_text(hurried.replace("refresh_interval: 30s", "refresh_interval: 1s"))
    port = free_port()
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={home}/prometheus.yaml", f"--storage.tsdb.path={home}/data"),
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (home / "log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        until(ready, what="Prometheus getting ready")
        yield url, home / "targets"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def live(
    prometheus: tuple[str, Path],
    experiment: Callable[..., dict[str, Any]],
    digits: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    """Two ranks that train until the tests are done, seen by Prometheus."""
    url, targets = prometheus
    home = tmp_path_factory.mktemp("live")
    tree = experiment(
        loss={"ibot_start_epoch": 0},
        optim={"epochs": 5000},
        run={"checkpoint_every_steps": 10, "log_every_steps": 2},
        metrics={"port": 0, "targets_dir": str(targets), "health_every_steps": 2},
        eval={"every_steps": 10, "train": f"{digits}/val-000000.tar", "val": f"{digits}/val-000000.tar"},
    )
    (home / "config.yaml").write_text(yaml.safe_dump(tree))
    log = home / "log"
    words = [str(home / "config.yaml"), "--run-dir", str(home / "night")]
    start_fork_server()
    started = Live(url, home / "night", targets, start_ranks(TRAIN, words, home, [log, log]))

    def evaluated() -> bool:
        assert all(rank.is_alive() for rank in started.ranks), log.read_text()[-4000:]
        wanted = (
            "poa_knn_accuracy_ratio",
            "poa_checkpoint_bytes",
            "run:poa_data_wait:ratio5m",
            "run:poa_images:rate5m",
        )
        return all(started.result(f'{name}{{run="{started.label}"}}') for name in wanted)

    try:
        until(evaluated, 200, "the first evaluation")
        yield started
    finally:
        stop(started.ranks)
