"""Whole runs: resume, kill, stop, bad steps, damaged checkpoints."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.files import read_json_lines

WORKER = Path(__file__).parents[1] / "workers" / "training.py"
LEAST = {  # to compute, for what is not about networks
    "model": {"depth": {"min": 2, "max": 3, "step": 1}},
    "heads": {"prototypes": [48]},
    "data": {"local_crops": {"count": 1, "size": 16}},
}
MEASURED = {"images_per_second", "time", "mfu", "memory_bytes", "slowest_rank"}


@pytest.fixture
def train(launch, tmp_path):
    """Run attempts of one experiment in one process tree; returns their exit codes and everything printed."""

    def run(tree, *attempts, timeout=280):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        (output,) = launch(WORKER, 1, path, json.dumps(attempts), timeout=timeout)
        return json.loads(output.strip().splitlines()[-1]), output

    return run


def values(run):
    """What `metrics.jsonl` says, without what clocks and the system measured."""
    return [{k: v for k, v in r.items() if not measured(k)} for r in read_json_lines(run / "metrics.jsonl")]


def measured(key):
    return key in MEASURED or "seconds" in key


def to(run, step, **more):
    return {"overrides": [f"run.dir={run}", f"run.max_steps={step}"], **more}


@pytest.mark.parametrize(
    ("family", "stage"), [("vit", 0), ("vit", 2), ("vit", 3), ("eva", 1), ("swin", 1), ("thin_resnet", 1)]
)
def test_a_stopped_and_resumed_run_writes_the_same_metrics(train, tmp_path, experiment, family, stage):
    tree = experiment(family, engine={"zero_stage": stage}, model={"drop_path": 0.3}, loss={"centering": "softmax"})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes, _ = train(tree, to(whole, 6), to(parts, 3), to(parts, 4), to(parts, 6))
    assert codes == [0, 0, 0, 0]
    assert [r["step"] for r in values(whole)] == list(range(1, 7))
    assert values(parts) == values(whole)


def test_a_complete_run_goes_on_and_others_begin_from_its_checkpoints(train, tmp_path, experiment):
    longer, forked, refused = (str(tmp_path / name) for name in ("longer", "forked", "refused"))
    tree = experiment(optim={"epochs": 2}, run={"dir": longer, "checkpoint_every_steps": 2})
    more = "optim.epochs=4"
    codes, output = train(
        tree,
        {},
        {"overrides": [more]},
        {"overrides": [more, f"run.dir={forked}"], "fork": f"{longer}@4"},
        {"overrides": [more, f"run.dir={refused}", "heads.prototypes=[48,32]"], "fork": longer + "@4"},
        {"overrides": [f"run.dir={refused}"], "fork": f"{longer}@8"},
        {"overrides": [more, f"run.dir={forked}"], "fork": f"{longer}@6"},
    )
    assert codes == [0, 0, 0, 2, 2, 2]
    assert [record["step"] for record in values(tmp_path / "longer")] == list(range(1, 9))
    assert values(tmp_path / "forked") == values(tmp_path / "longer")[4:]  # schedule, data and all state
    history = json.loads((tmp_path / "longer" / "manifest.json").read_text())["settings"]
    assert [(entry["from_step"], entry["values"]["optim.epochs"]) for entry in history] == [(0, 2), (4, 4)]
    manifest = json.loads((tmp_path / "forked" / "manifest.json").read_text())
    assert (manifest["forked_from"], manifest["settings"]) == ({"run": longer, "step": 4}, history)
    for line in (
        "note: from step 4 on optim.epochs is 4, and was 2",
        f"beginning {forked} at step 4, from the checkpoint of {longer}",
        "another model: heads.heads.1.prototypes is [64, 32] there and [32, 32] here",
        "the checkpoint is of step 8, and this run would end at step 4 (--fork-from): raise optim.epochs",
        f"the run directory holds a run that began from {longer}@4",
    ):
        assert line in output
    assert "lr is laid out anew: " in output


@pytest.mark.slow
def test_fifteen_kills_lose_and_double_nothing(train, tmp_path, experiment):
    steps, kills = 36, 15
    tree = experiment(**LEAST, optim={"epochs": 40}, run={"checkpoint_every_steps": 2, "keep": 2})
    chance = random.Random(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    attempts = [to(whole, steps)]
    for i in range(kills):
        moment, longest = (("save", 0.03), (f"steps:{chance.randint(3, 5)}", 0.03), ("start", 0.4))[i % 3]
        attempts.append(to(killed, steps, kill=moment, delay=chance.random() * longest))
    codes, output = train(tree, *attempts, to(killed, steps))
    assert codes[0] == codes[-1] == 0
    assert codes.count(-9) >= kills - 1, "a run too short to be killed so often"
    assert "damaged" not in output
    assert values(killed) == values(whole)
    assert len(list((killed / "checkpoints").glob("step_*"))) == 2
    assert not list((killed / "checkpoints").glob(".*"))


def test_sigterm_and_ctrl_c_save_and_exit_75_and_the_run_goes_on_until_it_is_complete(train, tmp_path, experiment):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    codes, output = train(
        experiment(**LEAST, run={"checkpoint_every_steps": 1000}),
        to(whole, 12),
        to(stopped, 12, kill="signal"),
        to(stopped, 12, kill="interrupt"),
        to(stopped, 12),
        to(stopped, 12),
    )
    assert codes == [0, 75, 75, 0, 0]
    assert output.count("stopped on a signal after saving step") == 2
    assert output.count("interrupted: saving after this step") == 1
    assert f"{stopped} is complete: it has a checkpoint of step 12" in output
    assert values(stopped) == values(whole)
    assert len(json.loads((stopped / "manifest.json").read_text())["starts"]) == 3  # a complete run does not start


def test_a_damaged_checkpoint_is_passed_over_loudly(train, tmp_path, experiment):
    tree = experiment(**LEAST)
    run, flipped = tmp_path / "run", tmp_path / "flipped"
    train(tree, to(run, 10))
    shutil.copytree(run, flipped)
    newest = flipped / "checkpoints" / "step_00000010" / "shard_00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    codes, output = train(tree, to(flipped, 12), to(run, 12))
    assert codes == [0, 0]
    assert "step_00000010 is damaged: shard_00000.safetensors has another checksum" in output
    assert "at step 8" in output
    assert values(flipped) == values(run)


def test_steps_go_on_while_a_checkpoint_is_written_and_one_rank_that_cannot_write_ends_the_run_on_all(
    launch, tmp_path, experiment
):
    whole, held = tmp_path / "whole", tmp_path / "held"
    for run in (whole, held):
        keys = {"dir": str(run), "checkpoint_every_steps": 2, "max_steps": 12, "keep": 1}
        run.with_suffix(".yaml").write_text(yaml.safe_dump(experiment(**LEAST, run=keys)))
    worker = Path(__file__).parents[1] / "workers" / "held_saves.py"
    outputs = launch(worker, 2, tmp_path / "out.json", whole.with_suffix(".yaml"), held.with_suffix(".yaml"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["codes"] == [0, 1, 0]

    seen = result["faulty"]
    assert [entry for entry in seen if entry[0] != "step"] == [
        ["begun", 2, [".step_00000002.tmp"]],
        ["written", 2],  # no file of it was written before step 3 was made
        ["begun", 4, [".step_00000004.tmp", "step_00000002"]],
        ["written", 4],
        ["begun", 6, [".step_00000006.tmp", "step_00000004"]],  # and retention has done its work by then
    ]
    assert seen.index(["step", 3]) < seen.index(["written", 2]) < seen.index(["step", 5]) < seen.index(["written", 4])
    assert seen[-1][0] == "step"
    assert seen[-1][1] < 12  # noticed at a step, and not when the next checkpoint was due
    assert sum(output.count("error:") for output in outputs) == 1
    assert re.search(
        r"error: cannot write the checkpoint of step 6: .*No space left on device .*the run continues from step 4",
        outputs[0],
    )
    assert "resuming" in outputs[0]
    assert values(held) == values(whole)  # so what step 4 saved is the state of step 4, not of 5, when it was written
    assert sorted(path.name for path in (held / "checkpoints").iterdir()) == ["latest", "step_00000012"]


def test_bad_steps_change_nothing_are_counted_and_stop_the_run(launch, tmp_path, experiment):
    engines = [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "offload_optimizer": "cpu"}, {"zero_stage": 3}]
    engines.append({"backend": "fsdp2", "zero_stage": None, "reshard_after_forward": True})
    runs = [tmp_path / f"run{i}" for i in range(len(engines))]
    for every, engine, run in zip((2, 100, 100, 100, 100), engines, runs, strict=True):
        keys = {"dir": str(run), "checkpoint_every_steps": every, "keep": 1}
        tree = experiment(**LEAST, optim={"max_bad_steps": 3}, run=keys, engine=engine)
        run.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
    tree = yaml.safe_load(runs[0].with_suffix(".yaml").read_text())
    tree["optim"]["base_lr"] = 0.01  # the way out that is printed
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(tree))
    worker, configs = Path(__file__).parents[1] / "workers" / "bad_steps.py", [run.with_suffix(".yaml") for run in runs]
    outputs = launch(worker, 2, tmp_path / "out.json", *configs, tmp_path / "again.yaml")
    *results, again = json.loads((tmp_path / "out.json").read_text())
    # what is saved within a streak is the state after the last good step, and nothing later that would push it out; and
    # no older one goes for it, since the streak may come of that very state
    saved = [["step_00000001", "step_00000003"], *[["step_00000003"]] * 4]
    for engine, run, result, names in zip(engines, runs, results, saved, strict=True):
        assert result == {"code": 1, "unchanged": [True] * 4}, engine
        records = read_json_lines(run / "metrics.jsonl")
        assert [r.get("bad") for r in records] == [None, ["ibot/elastic"], None, *[["ibot/elastic"]] * 3]
        assert records[-1]["bad_steps"] == 4
        assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == names
        manifest = json.loads((run / "checkpoints" / "step_00000003" / "manifest.json").read_text())
        assert (manifest["step"], manifest["bad_in_a_row"], manifest["bad_steps"]) == (3, 0, {"ibot/elastic": 1})
    assert again == {"code": 1, "unchanged": [True] * 3}  # three more, counted anew
    assert outputs[0].count("3 steps in a row were not finite (ibot/elastic)") == len(engines) + 1
    assert outputs[0].count("the newest checkpoint is that of step 3 (") == len(engines) + 1
    assert outputs[0].count("begin from an earlier checkpoint (--fork-from RUN@STEP") == len(engines) + 1
    assert "note: from step 3 on optim.base_lr is 0.01, and was 0.05" in outputs[0]
    history = json.loads((runs[0] / "manifest.json").read_text())["settings"]
    assert [(entry["from_step"], entry["values"]["optim.base_lr"]) for entry in history] == [(0, 0.05), (3, 0.01)]


def test_data_that_cannot_be_had_stops_the_run_by_name_after_saving(launch, tmp_path, experiment):
    run = tmp_path / "run"
    path = tmp_path / "config.yaml"
    keys = {"dir": str(run), "checkpoint_every_steps": 100, "max_steps": 4}
    path.write_text(yaml.safe_dump(experiment(**LEAST, run=keys)))
    worker = Path(__file__).parents[1] / "workers" / "lost_data.py"
    outputs = launch(worker, 2, tmp_path / "out.json", path)
    name = "there is no such object (s3://bucket/train-000007.tar): bring it back"
    assert json.loads((tmp_path / "out.json").read_text()) == [1, name, 0]
    assert outputs[0].count(f"error: {name}") == 1, "what may pass is said, and worth another try"
    assert [start["step"] for start in json.loads((run / "manifest.json").read_text())["starts"]] == [0, 2, 2]
    records = read_json_lines(run / "metrics.jsonl")
    assert [(r["step"], r["images"], r["bad_steps"]) for r in records] == [(i, 8 * i, 0) for i in range(1, 5)]
