"""Records of `metrics.jsonl` for W&B and MLflow, if a run asks for them; `tensorboard` writes files of its own.

Both are told of a run by a thread that the training does not wait for. Where to send to, and with what rights, the
libraries take from their own environment variables.
"""

import importlib.util
import math
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.schema import MetricsConfig
from pipeline.errors import UserError
from pipeline.files import write_atomically

_CLOSING_SECONDS = 60.0
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Sink(Protocol):
    """Where records go."""

    def add(self, record: dict[str, Any]) -> None: ...

    def close(self, complete: bool) -> None: ...


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a finite number; its step and time are not among them."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and key not in ("step", "time") and math.isfinite(value)
    }


def require_packages(metrics: MetricsConfig) -> None:
    """Raises UserError: the library of a sink that is asked for is not installed."""
    for name, package in _PACKAGES.items():
        if getattr(metrics, name) and not importlib.util.find_spec(name):
            raise UserError(f"{name} is not installed", f"metrics.{name}", f"pip install {package}, or leave it out")


class Wandb:
    """A run of Weights & Biases, the same one at every start; WANDB_MODE=offline keeps it in `RUN/wandb`."""

    def __init__(self, project: str, directory: Path, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=project,
            dir=str(directory),
            id=_remembered(directory / "wandb.id", lambda: secrets.token_hex(4)),
            name=directory.resolve().name,
            config=config,
            resume="allow",
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own count cannot go back, a run that goes on can

    def add(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **numbers(record)})

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Mlflow:
    """A run of MLflow, the same one at every start; MLFLOW_TRACKING_URI says where."""

    def __init__(self, experiment: str, directory: Path, config: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()

        def begin() -> str:
            known = client.get_experiment_by_name(experiment)
            place = known.experiment_id if known else client.create_experiment(experiment)
            run = client.create_run(place, run_name=directory.resolve().name).info.run_id
            parameters = [Param(key, str(value)[:500]) for key, value in _flat(config)]
            for first in range(0, len(parameters), 100):  # as many as MLflow takes
                client.log_batch(run, params=parameters[first : first + 100])
            return run

        self._run = _remembered(directory / "mlflow.id", begin)
        client.update_run(self._run, status="RUNNING")

    def add(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        at = int(1000 * record["time"])
        self._client.log_batch(
            self._run, metrics=[Metric(key, value, at, record["step"]) for key, value in numbers(record).items()]
        )

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if complete else "KILLED")


class Background:
    """A sink that is opened and fed by a thread of its own; one that fails says so once and is fed no more.

    Args:
        name: of the sink, for its warning.
        make: opens it.
    """

    def __init__(self, name: str, make: Callable[[], Sink]):
        self._name, self._make = name, make
        self._records: queue.Queue[dict[str, Any] | bool] = queue.Queue()
        self._thread = threading.Thread(target=self._feed, name=f"sink {name}", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        self._records.put(dict(record))

    def close(self, complete: bool) -> None:
        """Send what waits; gives up after a minute, for a server that is away must not hold the job."""
        self._records.put(complete)
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            self._warn("not all records were taken in time")

    def _feed(self) -> None:
        try:
            sink = self._make()
            while isinstance(record := self._records.get(), dict):
                sink.add(record)
            sink.close(record)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")

    def _warn(self, what: str) -> None:
        print(f"warning: {self._name} gets no more records: {what}", file=sys.stderr)


def open_sinks(metrics: MetricsConfig, directory: Path, config: dict[str, Any]) -> list[Background]:
    """Those that a run asks for."""
    sinks: list[Background] = []
    project, experiment = metrics.wandb, metrics.mlflow
    if project:
        sinks.append(Background("wandb", lambda: Wandb(project, directory, config)))
    if experiment:
        sinks.append(Background("mlflow", lambda: Mlflow(experiment, directory, config)))
    return sinks


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """What a file holds, or else what is made now and written there."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        made = make()
        write_atomically(path, made + "\n")
        return made


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out
