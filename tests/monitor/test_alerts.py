"""The rules in promtool's own unit tests; a change of a threshold, comparison or window must fail them."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.measure.metrics import FAMILIES

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "yaml" / "monitoring"
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
CASES = yaml.safe_load((Path(__file__).parent / "alerts_test.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = [rule for group in ALERTS["groups"] for rule in group["rules"] if "record" in rule]
# a change of one rule that a careless hand could make, by alert; each must fail the unit tests
MUTANTS = {
    "PoaNoProgress": [("> 600", "> 6000"), ("> 600", "> 60"), ("max by", "min by"), ("time() -", "60 *")],
    "PoaNonFiniteSteps": [
        ("[10m]", "[1m]"),
        ("> 0 or", "> 1 or"),
        ("!=", "=="),
        ("[10m]", "[2h]"),
    ],
    "PoaThroughputDrop": [("0.7", "0.4"), ("0.7", "0.9"), ("<", ">"), ("[1h]", "[1m]")],
    "PoaDataStarvation": [("> 0.2", "> 0.5"), ("> 0.2", "> 0.05"), (">", "<")],
    "PoaSkippedSamples": [("> 0.01", "> 0.05"), ("> 0.01", "> 0.001"), (">", "<")],
    "PoaStoreTrouble": [("> 0.1", "> 0.3"), ("> 0.1", "> 0.02"), (">", "<")],
    "PoaCacheMisses": [("> 0.2", "> 0.3"), ("> 0.2", "> 0.02"), (">", "<")],
    "PoaCollapse": [
        ("< 0.5", "< 0.1"),
        ("< 0.5", "< 0.9"),
        ("< 0.05", "< 0.01"),
        ("< 0.05", "< 0.3"),
        ("or run", "and run"),
        ("> 1", "> 10"),
        ("> 1", "> 0.1"),
        ("< 0.1", "< 0.01"),
        ("< 0.1", "< 0.6"),
        ("> 2", "> 20"),
        ("> 2", "> 0.2"),
    ],
    "PoaCheckpointTooOld": [("2 *", "5 *"), ("2 *", "1 *"), (">", "<")],
    "PoaTargetGone": [("== 0", "== 1"), ('{job="poa"}', "")],
}
RECORD_MUTANTS = {
    "run:poa_images:rate5m": [("sum by", "max by")],
    "run:poa_data_wait:ratio5m": [('{phase="data_wait"}', "")],
    "run:poa_skipped_samples:ratio15m": [("sum by (run) (rate(poa_skipped", "min by (run) (rate(poa_skipped")],
    "run:poa_fetch_retries:ratio15m": [("sum by (run) (rate(poa_fetch", "max by (run) (rate(poa_fetch")],
    "run:poa_cache_misses:ratio15m": [("/ (sum by (run)", "/ (max by (run)"), ("poa_cache_hits", "poa_cache_misses")],
    "run:poa_target_entropy:ratio": [
        ("min by (run) (poa_target_entropy_nats", "max by (run) (poa_target_entropy_nats")
    ],
    "run:poa_target_uniform_kl:min": [('{branch="teacher"}', "")],
    "run:poa_effective_rank:ratio": [('{branch!="teacher"}', ""), ('{branch!="teacher"}', '{branch="teacher"}')],
}


def cases_of(name: str) -> dict:
    """The unit tests that can notice a change of one rule."""
    watching = {rule["alert"] for rule in RULES if name in (rule["alert"], *re.findall(r"run:\w+:\w+", rule["expr"]))}
    tests = [t for t in CASES["tests"] if watching & {case["alertname"] for case in t["alert_rule_test"]}]
    assert tests, f"no unit test watches {name}"
    return {**CASES, "tests": tests}


def outcomes(promtool, directory: Path, mutants: list[tuple[str, dict]]) -> dict[str, bool]:
    """Whether the unit tests pass with each of some changed rule files, in one run of promtool."""
    files = []
    for number, (name, rules) in enumerate(mutants):
        place = directory / str(number)
        place.mkdir()
        (place / "alerts.yaml").write_text(yaml.safe_dump(rules))
        (place / "test.yaml").write_text(yaml.safe_dump(cases_of(name)))
        files.append(f"{number}/test.yaml")
    done = promtool("test", "rules", *files, cwd=directory)
    found = re.findall(r"Unit Testing:  (\S+)\n\s+(SUCCESS|FAILED)", done.stdout)
    verdicts = dict(found)
    assert set(verdicts) == set(files), done.stdout
    return {file: verdict == "SUCCESS" for file, verdict in verdicts.items()}


def changed(name: str, key: str, old: str, new: str) -> dict:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        if name in (rule.get("alert"), rule.get("record")):
            assert old in str(rule[key]), f"{name} no longer holds {old!r}: mend the mutant"
            rule[key] = str(rule[key]).replace(old, new, 1)
    return rules


@pytest.mark.prometheus
def test_config_and_rules_are_valid(promtool):
    for command in (("check", "config", "prometheus.yaml"), ("check", "rules", "alerts.yaml")):
        done = promtool(*command, cwd=MONITORING)
        assert done.returncode == 0, done.stdout


@pytest.mark.prometheus
def test_every_alert_fires_and_stays_silent_as_it_should(tmp_path, promtool):
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    shutil.copy(Path(__file__).parent / "alerts_test.yaml", tmp_path)
    done = promtool("test", "rules", "alerts_test.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    tested = [case for test in CASES["tests"] for case in test["alert_rule_test"]]
    for rule in RULES:
        outcomes = {bool(case["exp_alerts"]) for case in tested if case["alertname"] == rule["alert"]}
        assert outcomes == {True, False}, f"{rule['alert']} needs a firing and a silent case"


@pytest.mark.prometheus
def test_every_mutant_of_a_rule_fails_its_test(tmp_path, promtool):
    changes = [(name, "expr", *change) for name, all_ in (MUTANTS | RECORD_MUTANTS).items() for change in all_]
    changes += [(rule["alert"], "for", rule["for"], "0s") for rule in RULES if "for" in rule]
    verdicts = outcomes(promtool, tmp_path, [(name, changed(name, key, old, new)) for name, key, old, new in changes])
    survivors = [change for change, passed in zip(changes, verdicts.values(), strict=True) if passed]
    assert not survivors


def test_every_rule_has_mutants():
    assert set(MUTANTS) == {rule["alert"] for rule in RULES}
    assert set(RECORD_MUTANTS) == {rule["record"] for rule in RECORDED}


def test_every_alert_has_its_line_in_the_runbook():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^#+ (Poa\w+)$", text, re.MULTILINE)}
    for rule in RULES:
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / file).is_file()
        assert anchor in headings, f"docs/monitoring.md says nothing about {rule['alert']}"


def test_the_documentation_lists_every_metric():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert [name for name in FAMILIES if f"| `{name}` |" not in text] == []
