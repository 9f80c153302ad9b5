"""What Prometheus, the dashboards and a browser see of a real run of two ranks."""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.measure.metrics import BANDS, FAMILIES, PHASES
from pipeline.monitor.panels import SECTIONS, expressions
from pipeline.monitor.watch import make_server

MONITORING = Path(__file__).parents[2] / "yaml" / "monitoring"

pytestmark = [pytest.mark.prometheus, pytest.mark.slow]


def records(live):
    return [json.loads(line) for line in (live.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def of_run(live):
    """A selector of the run's series."""
    return f'{{run="{live.label}"}}'


def test_prometheus_finds_the_run_through_its_target_file(live):
    (up,) = live.result(f'up{{job="poa",run="{live.label}"}}')
    assert up["value"][1] == "1"
    assert up["metric"]["instance"] == up["metric"]["node"]


def test_every_metric_is_exported(live, of_run):
    missing = [f.name for f in FAMILIES.values() if not live.result(f.name + of_run)]
    assert missing == ["poa_step_seconds"]  # a histogram has no series of its own name
    assert live.result(f"poa_step_seconds_bucket{of_run}")
    assert {r["metric"]["phase"] for r in live.result(f"poa_phase_seconds_total{of_run}")} == set(PHASES)
    assert {r["metric"]["band"] for r in live.result(f"poa_subnet_steps_total{of_run}")} == set(BANDS)
    assert {r["metric"]["branch"] for r in live.result(f"poa_effective_rank{of_run}")} == {
        "teacher",
        "intact",
        "elastic",
    }
    labels = {label for r in live.result(f'{{__name__=~"poa_.*",run="{live.label}"}}') for label in r["metric"]}
    assert "rank" not in labels


def test_every_expression_of_the_dashboards_returns_data(live):
    answers = {
        (panel, expr): live.query(expr.replace("$__rate_interval", "1m").replace("$run", live.label))
        for panel, expr in expressions()
    }
    refused = {key: answer["error"] for key, answer in answers.items() if answer["status"] != "success"}
    assert refused == {}
    assert [key for key, answer in answers.items() if not answer["data"]["result"]] == []


def test_every_expression_of_the_rules_returns_data(live):
    """With comparisons that say 0 or 1 instead of filtering, so that an alert that is silent has data too."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        expr = re.sub(r"(?<![=!~<>])(>|<|==|!=)(?=\s|\s*$)", r"\1 bool", rule["expr"])
        answer = live.query(expr)
        assert answer["status"] == "success", (expr, answer)
        runs = {r["metric"].get("run") for r in answer["data"]["result"]}
        assert live.label in runs, f"no data for {expr}"


def test_what_is_exported_is_what_the_run_recorded(live, of_run):
    step = int(live.result(f"poa_step{of_run}")[0]["value"][1])
    images = live.result(f"poa_images_total{of_run} - 8 * poa_step{of_run}")[0]["value"][1]
    assert float(images) == 0  # two ranks of four images each
    drawn = live.result(f"sum(poa_subnet_steps_total{of_run}) - 2 * sum(poa_step{of_run})")[0]["value"][1]
    assert float(drawn) == 0
    seen = records(live)
    assert seen[-1]["step"] >= step - 2
    by_phase = sum(float(r["value"][1]) for r in live.result(f"poa_phase_seconds_total{of_run}"))
    wall = float(live.result(f"poa_step_seconds_sum{of_run}")[0]["value"][1])
    assert 0.5 < by_phase / wall < 2.0


def test_records_hold_phases_health_and_accuracy(live, of_run):
    merged = {key for record in records(live) for key in record}
    assert {f"{phase}_seconds_per_step" for phase in PHASES} <= merged
    assert {"mfu", "slowest_rank", "entropy_teacher", "effective_rank_elastic", "knn_step"} <= merged
    evaluated = [json.loads(line) for line in (live.run_dir / "eval" / "online_knn.jsonl").read_text().splitlines()]
    assert evaluated[0]["step"] == 10
    names = evaluated[0].keys() - {"step"}
    assert len(names) == 3
    # the shards are their own neighbours, so that a network which tells images apart finds most
    assert all(evaluated[0][name] > 0.3 for name in names)
    exported = {r["metric"]["subnet"]: float(r["value"][1]) for r in live.result(f"poa_knn_accuracy_ratio{of_run}")}
    assert exported.keys() == names


def test_the_page_shows_every_panel_in_a_browser(live, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    server = make_server(live.label, live.url, "127.0.0.1", 0)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"),
            *("--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/?span=300"),
        ]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        server.shutdown()
    assert 'data-ready="1"' in dom
    assert "panel error" not in dom
    counts = [int(n) for n in re.findall(r'<section class="panel" data-series="(\d+)"', dom)]
    assert len(counts) == sum(len(section.panels) for section in SECTIONS)
    assert min(counts) > 0
    assert dom.count("<path") >= sum(p.kind != "stat" for section in SECTIONS for p in section.panels)
    assert not re.findall(r'(?:src|href)="https?://', dom)


def test_the_page_passes_nothing_on_but_reading(live):
    server = make_server(live.label, live.url, "127.0.0.1", 0)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in ("/api/v1/admin/tsdb/snapshot", "/-/quit", "/api/v1/status/config", "/../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=10)
            assert refused.value.code == 404
        server.shutdown()


def test_training_goes_on_through_a_scrape_storm_and_without_its_endpoint(live, wait):
    target = json.loads(next(live.targets.glob("*.json")).read_text())[0]["targets"][0]

    def scrape(_):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            return len(answer.read())

    with ThreadPoolExecutor(10) as pool:
        assert min(pool.map(scrape, range(100))) > 1000
    endpoints = [p for p in psutil.Process(live.ranks[0].pid).children() if "pipeline.monitor.endpoint" in p.cmdline()]
    (endpoint,) = endpoints
    endpoint.kill()
    before = records(live)[-1]["step"]
    wait(lambda: records(live)[-1]["step"] >= before + 6, what="progress without an endpoint")
    assert all(rank.is_alive() for rank in live.ranks)


def test_a_run_that_is_stopped_leaves_no_target_behind(live, wait):
    """The last test: it ends the run."""
    wait(lambda: live.result(f'up{{job="poa",run="{live.label}"}} == 1'), what="the endpoint's return")
    began = time.monotonic()
    for rank in live.ranks:
        rank.terminate()
    for rank in live.ranks:
        rank.join(60)
    assert [rank.exitcode for rank in live.ranks] == [75, 75]
    assert time.monotonic() - began < 60
    assert list(live.targets.glob("*.json")) == []
