"""Looking at a run changes nothing in it, and shows a collapse that its loss hides."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.elastic import Subnet, cost
from pipeline.measure.health import largest_entropy
from pipeline.measure.metrics import PHASES

WORKER = Path(__file__).parents[1] / "workers" / "watched_steps.py"
ALERTS = Path(__file__).parents[2] / "yaml" / "monitoring" / "alerts.yaml"
STEPS = 16
CENTERINGS = ("none", "sinkhorn", "softmax")


@pytest.fixture(scope="module")
def watched(launch, experiment, tmp_path_factory) -> dict:
    """The same experiment with each centering, and once unwatched."""
    home = tmp_path_factory.mktemp("watched")

    def write(name: str, centering: str, every: int) -> Path:
        tree = experiment(
            data={"batch_size": 16},
            loss={"centering": centering, "ibot_start_epoch": 2},
            optim={"ema": [0.9, 0.99]},
            metrics={"health_every_steps": every},
        )
        (home / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return home / f"{name}.yaml"

    configs = [write(name, name, 2) for name in CENTERINGS] + [write("unwatched", "sinkhorn", 10_000)]
    launch(WORKER, 1, home / "out.json", STEPS, *configs, timeout=280)
    return {"config": load_config(configs[0]), **json.loads((home / "out.json").read_text())}


def health(run: dict, slot: str, what: str) -> list[float]:
    return [step["health"][slot][what] for step in run["steps"] if step["health"]]


def test_watching_a_run_changes_no_bit_of_it(watched):
    assert watched["sinkhorn"]["weights"] == watched["unwatched"]["weights"]
    assert [s["losses"] for s in watched["sinkhorn"]["steps"]] == [s["losses"] for s in watched["unwatched"]["steps"]]
    assert all(not step["health"] for step in watched["unwatched"]["steps"])


def test_health_is_looked_at_when_it_is_due(watched):
    due = [bool(step["health"]) for step in watched["none"]["steps"]]
    assert due == [bool(i % 2) for i in range(STEPS)]


def test_phases_of_a_real_step_are_all_measured(watched):
    phases = watched["sinkhorn"]["phases"]
    assert {phase for phase in PHASES if phases[phase] > 0} == set(PHASES) - {"checkpoint"}


def test_flops_count_the_networks_that_were_trained(watched):
    config = watched["config"]
    largest = cost.step_flops(config, Subnet(64, (4,)), 0)
    smallest = cost.step_flops(config, Subnet(32, (2,)), 0)
    counted = [step["flops"] for step in watched["none"]["steps"][:3]]  # before iBOT
    assert all(smallest.total <= flops <= largest.total for flops in counted)
    assert len(set(counted)) > 1


def test_without_centering_entropy_falls_at_once_while_the_loss_looks_well(watched):
    largest = largest_entropy(watched["config"].heads.prototypes)
    collapsed = [value / largest for value in health(watched["none"], "teacher", "entropy")]
    losses = [step["losses"]["dino/intact"] for step in watched["none"]["steps"]]
    alarm = next(i for i, ratio in enumerate(collapsed) if ratio < 0.5)
    told = 2 * alarm + 1  # the step of that look
    assert all(map(math.isfinite, losses))
    assert told <= STEPS // 2
    assert losses[-1] < losses[told] / 2  # most of its fall, which would look like learning, is still to come
    for centering in ("sinkhorn", "softmax"):
        sound = [value / largest for value in health(watched[centering], "teacher", "entropy")]
        assert min(sound[-2:]) > 0.5, centering  # running centers take some steps to settle


@pytest.mark.prometheus
def test_the_collapse_alert_fires_on_the_collapsed_run_alone(watched, tmp_path, promtool):
    """The rule on the values that the runs really had, one look every 30 seconds, the last one kept."""
    largest = largest_entropy(watched["config"].heads.prototypes)
    series = []
    for centering in CENTERINGS:
        for branch in ("teacher", "intact", "elastic"):
            for name, what in (("target_entropy_nats", "entropy"), ("effective_rank", "effective_rank")):
                values = health(watched[centering], branch, what)
                text = " ".join(map(str, [*values, *[values[-1]] * 20]))
                series.append({"series": f'poa_{name}{{run="{centering}",branch="{branch}"}}', "values": text})
        for name, value in (("target_entropy_max_nats", largest), ("effective_rank_max", 32), ("epoch", 2)):
            series.append({"series": f'poa_{name}{{run="{centering}"}}', "values": f"{value}x40"})
    annotations = {
        "summary": "run none: the representation collapses",
        "runbook": "docs/monitoring.md#poacollapse",
    }
    alert = {"exp_labels": {"severity": "page", "run": "none"}, "exp_annotations": annotations}
    case = {"eval_time": "10m", "alertname": "PoaCollapse", "exp_alerts": [alert]}
    tests = {
        "rule_files": ["alerts.yaml"],
        "evaluation_interval": "30s",
        "tests": [{"interval": "30s", "input_series": series, "alert_rule_test": [case]}],
    }
    shutil.copy(ALERTS, tmp_path)
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))
    done = promtool("test", "rules", "test.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
