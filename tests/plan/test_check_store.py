from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.plan import check_store as checks
from pipeline.plan.check_store import check_store


@pytest.fixture
def path(experiment: Callable, serve: Callable, digits: Path, tmp_path: Path) -> Path:
    """An experiment whose shards are in a store, with a cache; 8 ranks are a node."""
    url = serve(digits).url
    data = {
        "train": f"{url}/train-{{000000..000002}}.tar",
        "batch_size": 4,
        "cache": {"folder": str(tmp_path / "node")},
    }
    tree = experiment(data=data, run={"dir": str(tmp_path / "run")})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


@pytest.fixture
def size(digits: Path) -> int:
    return sum(path.stat().st_size for path in digits.glob("train-*.tar"))


@pytest.mark.parametrize(
    ("ranks", "keys", "status", "words"),
    [
        (8, [], "pass", "{whole} GB per epoch for each of 1 node; room for "),
        (16, ["data.lanes=2"], "pass", "{half} GB per epoch for each of 2 nodes"),
        (
            16,
            [],
            "warn",
            "{whole} GB per epoch for each of 2 nodes.*data.lanes=1 does not divide among the nodes.*multiple of 2",
        ),
        (32, [], "warn", "data.lanes=1 does not divide among the nodes"),
        (16, ["data.lanes=6"], "warn", "data.lanes=6 does not divide a global batch of 64"),
        (8, ["data.cache.folder=null"], "warn", "sample by sample, again in every epoch.*set data.cache.folder"),
        (8, ["data.cache.gb=0.0001"], "warn", "the rest is read sample by sample.*raise data.cache.gb"),
    ],
)
def test_doctor_says_what_nodes_fetch_and_keep(
    path: Path, size: int, ranks: int, keys: list[str], status: str, words: str
):
    found = check_store(load_config(path, keys), ranks)
    expected = words.format(whole=f"{size / 1e9:.3g}", half=f"{size / 2e9:.3g}")
    assert found is not None
    assert found.status == status
    assert f"{size / 1e9:.3g} GB in stores" in found.finding
    for part in expected.split(".*"):
        assert part in f"{found.finding} {found.fix}"


def test_folder_that_ranks_cannot_lock_or_other_nodes_see_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checks, "file_system", lambda folder: "nfs4")
        found = check_store(load_config(path), 8)
        assert found is not None
        assert (found.status, "(nfs4) is on a network" in found.finding) == ("warn", True)
    monkeypatch.setattr(checks, "locks_work", lambda folder: False)
    found = check_store(load_config(path), 8)
    assert found is not None
    assert (found.status, "flock does not work" in found.finding) == ("fail", True)


def test_shards_on_a_disk_are_no_matter_of_stores(path: Path, digits: Path) -> None:
    assert check_store(load_config(path, [f"data.train={digits}/train-000000.tar"]), 8) is None


def test_plan_says_what_a_node_fetches(path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--gpus", "32", "data.lanes=4"]) == 0
    text = capsys.readouterr().out
    assert "4 nodes of 8 GPUs, 4 lanes: in the first epoch a node fetches 25.0% of the set" in text
    assert f"({size / 4e9:.3g} GB); 0.0% one by one and in every epoch anew; it keeps up to 100 GB in " in text
    assert main(["plan", str(path), "--gpus", "32", "data.train=s3://x/train-{0..9}.tar"]) == 0
    assert "a node fetches 25.0% of the set; 25.0% one by one" in capsys.readouterr().out
