from pathlib import Path

from pipeline.config import parse_config
from pipeline.data.remote.patience import WEATHER
from pipeline.plan.check_sources import check_sources


def test_each_source_is_read_for_a_while_and_a_lost_one_is_named(digits: Path, tmp_path: Path) -> None:
    names = ("train-{000000..000001}", "train-000002")
    sources = [{"name": f"part{i}", "url": str(digits / f"{name}.tar")} for i, name in enumerate(names)]
    config = parse_config({"data": {"train": sources}})
    before = WEATHER.patience
    check = check_sources(config)
    assert check.status == "pass"
    assert [part.split(" images")[0] for part in check.finding.split("; ")] == ["part0: 999", "part1: 437"]
    assert WEATHER.patience == before
