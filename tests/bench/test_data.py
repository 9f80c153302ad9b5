from pathlib import Path

from pipeline.bench.data import benchmark
from pipeline.config import DataConfig


def test_benchmark_splits_what_it_measures(digits: Path) -> None:
    crops = {"global_crops": {"size": 64}, "local_crops": {"count": 1, "size": 32}}
    train = str(digits / "train-{000000..000002}.tar")
    found = benchmark(DataConfig.model_validate({"train": train, "batch_size": 16, "threads": 1, **crops}), batches=3)
    assert found["images"] == 48
    assert found["images_per_second"] > 0
    assert found["coloured_by_kernels"]["images_per_second"] > 0
    stages = found["stages_cpu_ms_per_image"]
    assert list(stages) == ["read and draw", "decode", "crop and normalise", "colour", "blur and solarise"]
    assert stages["read and draw"] > 0
    assert stages["decode"] > 0
