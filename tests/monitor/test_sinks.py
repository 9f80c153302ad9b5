"""W&B offline and MLflow in a local folder, told of a run that stops and goes on."""

import pytest

from pipeline.config.schema import MetricsConfig
from pipeline.errors import UserError
from pipeline.monitor import sinks
from pipeline.monitor.sinks import Background, open_sinks, require_packages

CONFIG = {"model": {"family": "vit"}, "optim": {"base_lr": 0.1}}


def tell(metrics: MetricsConfig, directory, steps, complete: bool) -> None:
    for sink in open_sinks(metrics, directory, CONFIG):
        for step in steps:
            sink.add({"step": step, "time": 100.0 + step, "loss": 1.0 / step, "subnet": "1x1", "lr": float("nan")})
        sink.close(complete)


def test_mlflow_gets_numbers_and_configuration_and_goes_on_with_its_run(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder instead of a server or a database
    tell(MetricsConfig(mlflow="photos"), tmp_path, (1, 2), complete=False)
    assert "warning: mlflow" not in capfd.readouterr().err
    client = mlflow.MlflowClient(store.as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "photos"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    assert run.data.params == {"model.family": "vit", "optim.base_lr": "0.1"}
    tell(MetricsConfig(mlflow="photos"), tmp_path, (2, 4), complete=True)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {"loss"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value, m.timestamp) for m in history) == [
        (1, 1.0, 101000),
        (2, 0.5, 102000),
        (2, 0.5, 102000),
        (4, 0.25, 104000),
    ]


def test_wandb_keeps_an_offline_run_that_goes_on_under_its_id(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(MetricsConfig(wandb="photos"), tmp_path, (1, 2), complete=False)
    name = (tmp_path / "wandb.id").read_text().strip()
    tell(MetricsConfig(wandb="photos"), tmp_path, (2, 3), complete=True)
    assert "warning: wandb" not in capfd.readouterr().err
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) >= 1
    content = b"".join(path.read_bytes() for path in files)
    assert b"loss" in content
    assert b"subnet" not in content


def test_a_sink_that_fails_costs_a_warning_and_no_step(capsys, monkeypatch):
    class Broken:
        def add(self, record):
            raise OSError("the server is away")

        def close(self, complete): ...

    sink = Background("mlflow", Broken)
    for step in range(3):
        sink.add({"step": step})
    sink.close(True)
    assert capsys.readouterr().err == "warning: mlflow gets no more records: OSError: the server is away\n"


def test_a_library_that_is_missing_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed \(metrics.mlflow\): pip install mlflow-skinny"):
        require_packages(MetricsConfig(mlflow="photos"))
    require_packages(MetricsConfig())
