"""What tests of several areas share."""

import copy
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parent / "workers"))  # launcher.py, which is no test

from launcher import run_ranks, unused_port

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

TINY = {
    "model": {"image_size": 32, "drop_path": 0.0},
    "heads": {"prototypes": [48, 64], "hidden_dim": 64, "bottleneck_dim": 32},
    "loss": {"ibot_start_epoch": 1, "teacher_temp": {"warmup_epochs": 2}},
    "data": {
        "batch_size": 4,
        "threads": 1,
    },
    "optim": {"epochs": 10, "steps_per_epoch": 2, "warmup_epochs": 1, "base_lr": 0.05},
    "engine": {"zero_stage": 1, "precision": "fp32", "kernels": "eager", "compile": False},
    "run": {"checkpoint_every_steps": 4, "log_every_steps": 1},
}
FAMILIES = {
    "vit": {
        "patch_size": 8,
        "head_dim": 16,
        "width": {"min": 32, "max": 64, "step": 16},
        "depth": {"min": 2, "max": 4, "step": 1},
        "layer_scale": 0.1,
    },
    "swin": {
        "family": "swin",
        "image_size": 64,
        "head_dim": 8,
        "window_size": 4,
        "width": {"min": 16, "max": 32, "step": 8},
        "depth": {"min": 2, "max": 4, "step": 1},
    },
    "resnet": {
        "family": "resnet",
        "image_size": 64,
        "width": {"min": 32, "max": 64, "step": 32},
        "depth": {"min": [1, 1, 1, 1], "max": [1, 2, 3, 1], "step": 1},
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks by `launch`, which `make check` leaves out, and begin with the files that take longest.

    A worker runs all of a file, and one that began with the longest file last would be alone at the end.
    """
    kinds = ("slurm", "slow", "runs")
    ranks: dict[Path, int] = {}
    for item in items:
        if "launch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.runs)
        rank = next((i for i, kind in enumerate(kinds) if item.get_closest_marker(kind)), len(kinds))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session")
def photos() -> Path:
    """Directory with the labelled photographs `train-*.tar` and `val-*.tar`."""
    path = SHARED_DATA / "clothing"
    if not path.is_dir():
        pytest.skip(f"{path} is not here: this test wants photographs")
    return path


@pytest.fixture(scope="session")
def odd() -> Path:
    """Directory with the shard of awkward images and `odd.json`."""
    path = SHARED_DATA / "odd"
    if not path.is_dir():
        pytest.skip(f"{path} is not here: this test wants awkward images")
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with shards of the embedded digits, `train-*.tar` and `val-*.tar`."""
    from pipeline.data.shards import build

    directory = tmp_path_factory.mktemp("digits")
    build("sklearn:digits", directory / "shards", per_shard=500, progress=False)
    return directory / "shards"


@pytest.fixture(scope="session")
def experiment(digits: Path) -> Callable[..., dict[str, Any]]:
    """Make the tree of a tiny experiment on the digits; keyword arguments update its sections."""

    def make(family: str = "vit", **sections: dict[str, Any]) -> dict[str, Any]:
        tree = copy.deepcopy(TINY)
        tree["model"] |= FAMILIES[family]
        size = tree["model"]["image_size"]
        tree["data"] |= {"global_crops": {"size": size}, "local_crops": {"count": 2, "size": size // 2}}
        tree["data"]["train"] = f"{digits}/train-{{000000..000002}}.tar"
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        return tree

    return make


@pytest.fixture(scope="session")
def labelled(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Some labelled shards, `train` and `val`: photographs where they are, else the embedded digits."""
    photographs = SHARED_DATA / "clothing"
    directory = photographs if photographs.is_dir() else request.getfixturevalue("digits")
    train, val = (sorted(map(str, directory.glob(f"{split}-*.tar"))) for split in ("train", "val"))
    return {"train": train[:2], "val": val[-1:]}


@pytest.fixture(scope="session")
def trained_runs(
    launch: Callable[..., list[str]],
    experiment: Callable[..., dict[str, Any]],
    labelled: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Train a tiny network of a family for eight real steps, once; gives the run directory, to be left as it is."""

    @cache
    def trained(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        tree = experiment(family, data=labelled, run={"dir": str(directory / "run"), "max_steps": 8})
        (directory / "config.yaml").write_text(yaml.safe_dump(tree))
        launch(ROOT / "tests" / "workers" / "train.py", 1, directory / "config.yaml")
        return directory / "run"

    return trained


@pytest.fixture(scope="session")
def trained_run(trained_runs: Callable[[str], Path]) -> Path:
    """Run directory of a tiny ViT after eight real training steps; leave it as it is, or copy it."""
    return trained_runs("vit")


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Run a Python script as several ranks; returns what each printed, fails if one failed."""

    def run(script: Path, ranks: int, *args: object, timeout: float = 240, fresh: bool = False) -> list[str]:
        return run_ranks(script, ranks, list(map(str, args)), tmp_path_factory.mktemp("launch"), timeout, fresh)

    return run
