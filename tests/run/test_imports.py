"""What a run on the CPU that compiles nothing imports, and what it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "imported.py"
HEAVY = {  # and what would bring it in
    "torch._dynamo": "timm, torchvision (pipeline.elastic.compiler), torch's optimizers (pipeline.engine.layouts)",
    "torch._inductor": "DeepSpeed's Muon, or whatever imports torch._dynamo",
    "torch.distributed.fsdp": "torch._dynamo",
    "torch.utils.flop_counter": "pipeline.evaluate.targets, which needs it for directories only",
    "sympy": "torch._dynamo",
    "sklearn": "pipeline.evaluate.linear",
    "scipy": "sklearn",
    "pandas": "torch._dynamo",
    "distutils": "DeepSpeed, when it looks which of its operators could be built",
    "webdataset": "pipeline.data.shards",
    "wandb": "timm (pipeline.elastic.layers)",
    "mlflow": "DeepSpeed's autotuner (pipeline.engine.zero)",
    "triton": "DeepSpeed's kernels",
    "boto3": "tensorboard (pipeline.monitor.tensorboard)",
    "fsspec": "tensorboard",
    "requests": "mlflow, wandb",
    "pyarrow": "mlflow, fsspec",
}


@pytest.mark.runs
def test_training_on_a_cpu_imports_no_compiler_and_nothing_else_that_it_does_not_use(launch, experiment, tmp_path):
    configs = []
    for stage in (0, 1, 2):
        tree = experiment(engine={"zero_stage": stage}, run={"dir": str(tmp_path / f"run{stage}"), "max_steps": 1})
        configs.append(tmp_path / f"{stage}.yaml")
        configs[-1].write_text(yaml.safe_dump(tree))
    (output,) = launch(WORKER, 1, *configs, fresh=True)
    told = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [run["code"] for run in told] == [0, 0, 0]
    for run in told:
        assert {name: why for name, why in HEAVY.items() if name in run["modules"]} == {}
        assert {"torch", "timm", "torchvision", "deepspeed", "nvidia.dali"} <= set(run["modules"])


@pytest.mark.runs
def test_commands_that_use_a_run_import_no_compiler(trained_run, tmp_path):
    run, (shards,) = str(trained_run), yaml.safe_load((trained_run / "config.yaml").read_text())["data"]["val"]
    commands = [
        ["extract", run, "--subnet", "32x2", "--out", str(tmp_path / "models")],
        ["eval", "knn", run, "--subnets", "32x2", "--train", shards, "--val", shards],
        ["embed", run, "--subnet", "32x2", shards, "--out", str(tmp_path / "features")],
    ]
    code = (
        f"import sys\nfrom pipeline.cli import main\nassert [main(words) for words in {commands!r}] == [0, 0, 0]\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
