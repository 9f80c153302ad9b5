"""What tests of several areas share."""

import copy
import fcntl
import gc
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("workers", "pictures"))  # modules that are no tests

from awkward import write_awkward
from launcher import ON_CPU, gpus, run_ranks, start_fork_server, unused_port
from scenes import write_labelled

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("POA_TEST_DATA") or ROOT.parent / "shared" / "data")
gc.set_threshold(50_000, 20, 50)  # to look for garbage among all that torch makes took up to a tenth of a worker's time
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the suite was started in the background; what it starts was not
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not gpus():
    os.environ.setdefault("DS_ACCELERATOR", ON_CPU["DS_ACCELERATOR"])

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
    "eva": {
        "family": "eva",
        "patch_size": 8,
        "head_dim": 16,
        "width": {"min": 32, "max": 64, "step": 16},
        "depth": {"min": 2, "max": 4, "step": 1},
        "layer_scale": 0.1,
        "registers": 2,
        "swiglu": True,
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
FAMILIES["thin_resnet"] = FAMILIES["resnet"] | {"width": {"min": 4, "max": 8, "step": 4}}  # of `thin_resnets.py` alone
BATCH = {"resnet": 2, "thin_resnet": 2}  # its narrowest network is forty times a ViT of these; elsewhere 4


def _sources() -> list[Any]:
    """Where pictures come from: rendered ones always, and the real ones of `POA_TEST_DATA` where they are."""
    if (SHARED_DATA / "clothing").is_dir():
        return ["own", pytest.param("shared", marks=pytest.mark.wide)]
    if os.environ.get("POA_TEST_DATA"):
        raise pytest.UsageError(f"{SHARED_DATA} holds no clothing/ (POA_TEST_DATA): name the folder of the real images")
    return ["own"]


@pytest.fixture(scope="session", params=_sources())
def source(request: pytest.FixtureRequest) -> str:
    """`own` or `shared`; a test that looks at pictures runs for each."""
    return request.param


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
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a directory that the workers of xdist share, to be left as it is; the one that needs it first fills it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made"
    place.mkdir(exist_ok=True)

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        directory, done = place / name, place / f"{name}.done"
        with (place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
                directory.mkdir()
                fill(directory)
                done.touch()
        return directory

    return made


@pytest.fixture(scope="session")
def rendered(made_once: Callable[..., Path]) -> Path:
    """Directory with labelled pictures of our own, `train-*.tar` and `val-*.tar`."""
    return made_once("photos", write_labelled)


@pytest.fixture(scope="session")
def photos(source: str, rendered: Path) -> Path:
    """Directory with the labelled photographs `train-*.tar` and `val-*.tar`."""
    return SHARED_DATA / "clothing" if source == "shared" else rendered


@pytest.fixture(scope="session")
def odd(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the shard of awkward images and `odd.json`."""
    if source == "shared":
        return SHARED_DATA / "odd"
    directory = tmp_path_factory.mktemp("odd")
    write_awkward(directory)
    return directory


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
        tree["data"]["batch_size"] = BATCH.get(family, tree["data"]["batch_size"])
        tree["data"]["train"] = f"{digits}/train-{{000000..000002}}.tar"
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        return tree

    return make


def _some(directory: Path) -> dict[str, list[str]]:
    """Some shards of labelled photographs, `train` and `val`."""
    train, val = (sorted(map(str, directory.glob(f"{split}-*.tar"))) for split in ("train", "val"))
    return {"train": train[:2], "val": val[-1:]}


@pytest.fixture(scope="session")
def labelled(rendered: Path) -> dict[str, list[str]]:
    """Some shards of rendered pictures.

    Networks are trained on these alone: what becomes of a network does not hang on who took the pictures, as reading,
    cropping and preparing them does.
    """
    return _some(rendered)


@pytest.fixture(scope="session")
def labelled_photos(photos: Path) -> dict[str, list[str]]:
    """Some shards of each source."""
    return _some(photos)


@pytest.fixture(scope="session")
def trained_runs(
    launch: Callable[..., list[str]],
    experiment: Callable[..., dict[str, Any]],
    labelled: dict[str, list[str]],
    made_once: Callable[..., Path],
) -> Callable[[str], Path]:
    """Train a tiny network of a family for eight real steps, once; gives the run directory, to be left as it is."""

    @cache
    def trained(family: str) -> Path:
        def train(directory: Path) -> None:
            tree = experiment(family, data=labelled, run={"dir": str(directory / "run"), "max_steps": 8})
            (directory / "config.yaml").write_text(yaml.safe_dump(tree))
            launch(ROOT / "tests" / "workers" / "train.py", 1, directory / "config.yaml")

        return made_once(f"trained_{family}", train) / "run"

    return trained


@pytest.fixture(scope="session")
def trained_run(trained_runs: Callable[[str], Path]) -> Path:
    """Run directory of a tiny ViT after eight real training steps; leave it as it is, or copy it."""
    return trained_runs("vit")


@pytest.fixture
def little_room() -> Callable[..., AbstractContextManager[None]]:
    """A block in which no file of this process may become larger than that, as a stand-in for a full disk."""

    @contextmanager
    def limit(size: int = 512) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)

    return limit


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Run a Python script as several ranks; returns what each printed, fails if one failed."""
    start_fork_server()  # here and not in `run`, which threads call too

    def run(script: Path, ranks: int, *args: object, timeout: float = 240, fresh: bool = False) -> list[str]:
        return run_ranks(script, ranks, list(map(str, args)), tmp_path_factory.mktemp("launch"), timeout, fresh)

    return run
