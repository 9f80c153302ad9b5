"""Grafana's server is not installed here: the dashboard's file is checked by structure and by Grafana's own SDK."""

import json
import re
from pathlib import Path

import pytest

from pipeline.measure.metrics import FAMILIES
from pipeline.monitor.grafana import COLUMNS, dashboard
from pipeline.monitor.panels import SECTIONS, SITE, expressions

FILE = Path(__file__).parents[2] / "yaml" / "monitoring" / "grafana" / "poa.json"
PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
VARIABLES = {"run", "datasource", "__rate_interval"}


def test_the_file_is_what_the_panel_list_makes():
    assert json.loads(FILE.read_text()) == dashboard(), (
        "python -m pipeline.monitor.grafana > yaml/monitoring/grafana/poa.json"
    )


def test_it_can_be_provisioned():
    board = dashboard()
    assert "id" not in board
    assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "run"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {panel["type"] for panel in board["panels"]} == {"row", "stat", "timeseries"}


def test_panels_lie_on_the_grid_without_overlap():
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]


def test_every_panel_of_the_list_is_there_in_its_section():
    titles = [panel["title"] for panel in dashboard()["panels"]]
    expected = [title for section in (*SECTIONS, SITE) for title in (section.title, *(p.title for p in section.panels))]
    assert titles == expected


def test_expressions_use_known_metrics_and_variables_and_belong_to_one_run():
    suffixes = {f"{name}{end}" for name in FAMILIES for end in ("_bucket", "_sum", "_count")}
    for title, expr in expressions():
        assert set(re.findall(r"\$\{?(\w+)", expr)) <= VARIABLES, title
        metrics = re.findall(r"\b(?:poa_\w+|run:\w+:\w+|up)(?=\{)", expr)
        assert metrics, title
        unknown = {m for m in metrics if not m.startswith("run:") and m != "up"} - set(FAMILIES) - suffixes
        assert not unknown, title
        assert expr.count('run="$run"') == len(metrics), f"{title} mixes runs"


@pytest.mark.prometheus
def test_a_sites_series_are_those_of_the_runs_job_alone(tmp_path, promtool):
    """By promtool on made-up series: two jobs share a node, and the run is one of them."""
    expr = SITE.panels[1].queries[0].expr.replace("$run", "mine")
    series = [
        {"series": 'poa_run_info{run="mine",exported_job="77",job="poa",node="n1"}', "values": "1x5"},
        {"series": 'poa_run_info{run="other",exported_job="78",job="poa",node="n1"}', "values": "1x5"},
        *(
            {"series": f'DCGM_FI_DEV_GPU_UTIL{{Hostname="n1",gpu="{gpu}",hpc_job="{job}"}}', "values": f"{value}x5"}
            for gpu, job, value in ((0, 77, 90), (1, 77, 80), (2, 78, 50), (3, "", 0))
        ),
    ]
    found = [
        {"labels": f'{{Hostname="n1",gpu="{gpu}",hpc_job="77"}}', "value": value} for gpu, value in ((0, 0.9), (1, 0.8))
    ]
    test = {"input_series": series, "interval": "1m"}
    test["promql_expr_test"] = [{"expr": expr, "eval_time": "2m", "exp_samples": found}]
    (tmp_path / "test.yaml").write_text(json.dumps({"rule_files": [], "tests": [test]}))
    done = promtool("test", "rules", "test.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("panel", SITE.panels, ids=lambda panel: panel.title)
def test_a_sites_panels_join_by_the_run_that_is_chosen(panel):
    (query,) = panel.queries
    assert re.fullmatch(
        r'DCGM_FI_\w+ \* on \(hpc_job\) group_left \(\) max by .*poa_run_info\{run="\$run"\}.*', query.expr
    )


def test_targets_of_a_panel_are_told_apart():
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(target["legendFormat"] for target in panel["targets"])


def test_grafanas_own_sdk_keeps_every_field():
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard())))

    def kept(ours, theirs, path=""):
        if isinstance(ours, dict):
            for key, value in ours.items():
                if value not in (None, [], {}, False, ""):
                    assert isinstance(theirs, dict), path
                    assert key in theirs, f"{path}.{key}"
                    kept(value, theirs[key], f"{path}.{key}")
        elif isinstance(ours, list):
            assert len(ours) == len(theirs), path
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                kept(a, b, f"{path}[{i}]")
        else:
            assert ours == theirs, path

    kept(dashboard(), back)
