"""Grafana's dashboard from the panel list: `python -m pipeline.monitor.grafana > yaml/monitoring/grafana/poa.json`."""

import json
from typing import Any

from pipeline.monitor.panels import SECTIONS, SITE, Panel

COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SIZES = {"stat": (4, 4), "timeseries": (8, 8), "stacked": (8, 8)}  # width, height on the grid


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana provisions it, templated by data source and run."""
    panels: list[dict[str, Any]] = []
    y = 0
    for section in (*SECTIONS, SITE):
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": section.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        x, y, bottom = 0, y + 1, y + 1
        for panel in section.panels:
            width, height = _SIZES[panel.kind]
            if x + width > COLUMNS:
                x, y = 0, bottom
            panels.append(_panel(panel, len(panels) + 1, {"h": height, "w": width, "x": x, "y": y}))
            x, bottom = x + width, max(bottom, y + height)
        y = bottom
    return {
        "uid": "poa-pretraining",
        "title": "POA pre-training",
        "tags": ["poa"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": _SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": True,
        }
        for i, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": "short" if panel.unit == "none" else panel.unit}
    if panel.floor_zero:
        defaults["min"] = 0
    common = {
        "id": number,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": targets,
    }
    if panel.kind == "stat":
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
        return {
            **common,
            "type": "stat",
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options | {"graphMode": "area", "colorMode": "none", "textMode": "value"},
        }
    if panel.kind == "stacked":
        defaults["custom"] = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
    return {
        **common,
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "type": "query",
        "label": "Run",
        "datasource": _SOURCE,
        "query": {"query": "label_values(poa_step, run)", "refId": "run"},
        "refresh": 2,
        "sort": 1,
        "includeAll": False,
        "multi": False,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
