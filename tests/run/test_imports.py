"""What a run on the CPU that compiles nothing imports, and what it does not."""

import json
from pathlib import Path

import pytest
import yaml

WORKER = Path(__file__).parents[1] / "workers" / "imported.py"
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
