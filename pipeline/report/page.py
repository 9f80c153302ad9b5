"""The report of a run: what its files say, on one page."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, dump_config
from pipeline.elastic import Grid, cost
from pipeline.errors import UserError
from pipeline.evaluate.online import representative_subnets
from pipeline.files import read_json, read_json_lines
from pipeline.measure.metrics import BANDS, PHASES
from pipeline.method.schedules import course_text
from pipeline.models.account import Ledger
from pipeline.models.loading import RunModels, run_config
from pipeline.models.results import read_results
from pipeline.report.charts import line_chart, number, scatter_chart, split_bar, table
from pipeline.report.template import page_of

Records = list[dict[str, Any]]
BRANCHES = ("teacher", "intact", "elastic")
LEAST_ACCURACY_SPAN = 0.02  # less than this is noise on most validation sets


def report(directory: Path) -> str:
    """The page as HTML that loads nothing from anywhere.

    Raises:
        UserError: `directory` holds no run, or one that has recorded nothing yet.
    """
    config = run_config(directory)
    records = read_json_lines(directory / "metrics.jsonl", "step")
    if not records:
        raise UserError("the run has recorded nothing yet", str(directory), "wait for its first log line")
    manifest = _manifest(directory)
    sections = {
        "Summary": _summary(config, records, manifest),
        "Losses": _losses(records),
        "Throughput and time": _times(records),
        "Health of the representation": _health(config, records),
        "Sub-networks": _subnets(directory, config, records),
        "What the sizes cost": _costs(directory, config, records),
        "Pictures": _pictures(directory, config, records, manifest),
        "Changed on the way": _changes(manifest),
        "Faults and restarts": _faults(directory, records, manifest),
        "Environment": _environment(manifest),
        "Configuration": f"<pre>{escape(dump_config(config))}</pre>",
    }
    return page_of(directory.resolve().name, "Report", "Report of a POA pre-training run", sections)


def _manifest(directory: Path) -> dict[str, Any]:
    """What the run says of itself; a page without it is better than none."""
    try:
        manifest = read_json(directory / "manifest.json", "the page goes without it")
    except (OSError, UserError) as error:
        print(f"warning: no manifest in the report: {error}", file=sys.stderr)
        manifest = {}
    return {
        "world_size": None,
        "code": "unknown",
        "seed": "unknown",
        **manifest,
        "starts": [start for start in _list(manifest.get("starts")) if isinstance(start, dict)],
        "data": _dict(manifest.get("data")),
        "versions": _dict(manifest.get("versions")),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def curve(records: Records, key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a record has the key."""
    return [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]


def curves(records: Records, keys: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Curves by legend, from record keys by legend."""
    return {legend: curve(records, key) for legend, key in keys.items()}


def _summary(config: ExperimentConfig, records: Records, manifest: dict[str, Any]) -> str:
    last = records[-1]
    end = min(config.optim.total_steps, config.run.max_steps or config.optim.total_steps)
    seconds, waits = (sum(v for _, v in curve(records, f"{kind}_seconds")) for kind in ("step", "data_wait"))
    starts, data = manifest["starts"], manifest["data"]
    tiles = {
        "Steps": f"{last['step']:,} of {end:,}",
        "Images seen": _number(last, "images"),
        "Loss": _number(last, "loss"),
        "Images/s (median)": number(_median(records, "images_per_second")),
        "Waiting for data": f"{100 * waits / seconds:.1f}%" if seconds else "unknown",
        "Utilization (median)": f"{100 * _median(records, 'mfu'):.1f}%",
        "Ranks": str(manifest["world_size"] or "unknown"),
        "Restarts": str(max(len(starts) - 1, 0)),
        "Bad steps": _number(last, "bad_steps"),
        "Samples left out": _number(last, "skipped_samples"),
    }
    grid = Grid(config.model)
    text = (
        f"{config.model.family}, largest network {grid.largest.name} with "
        f"{cost.params(config.model, grid.largest) / 1e6:.1f} M parameters, {len(grid)} sub-networks; "
        f"{_count(data.get('samples'))} images in {_count(data.get('shards'))} shards; first started "
        f"{starts[0].get('time', 'unknown') if starts else 'unknown'}."
    )
    boxes = "".join(f"<div><span>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in tiles.items())
    return f'<p>{escape(text)}</p><div class="tiles">{boxes}</div>'


def _losses(records: Records) -> str:
    both = {"intact": "{}_intact", "elastic": "{}_elastic"}
    charts = [line_chart("Total loss", {"total": curve(records, "loss")})]
    for term, title in (("dino", "DINO"), ("ibot", "iBOT"), ("koleo", "KoLeo"), ("anchor", "Anchor")):
        found = curves(records, {k: v.format(term) for k, v in both.items()})
        used = any(value for points in found.values() for _, value in points)  # zero before iBOT starts
        charts.append(line_chart(title, found) if used else "")
    distilled = {"global crops": "distill_global_elastic", "local crops": "distill_local_elastic"}
    charts.append(line_chart("Intact to elastic", curves(records, distilled)))
    norms = {"backbone": "grad_norm_backbone", "heads": "grad_norm_heads"}
    charts.append(line_chart("Gradient norm before clipping", curves(records, norms), floor_zero=True))
    charts.append(line_chart("Learning rate", {"learning rate": curve(records, "lr")}, floor_zero=True))
    charts.append(line_chart("Teacher temperature", {"temperature": curve(records, "teacher_temp")}))
    return _grid(charts)


def _times(records: Records) -> str:
    split = {}
    for phase in PHASES:
        values = [value for _, value in curve(records, f"{phase}_seconds_per_step")]
        if values:
            split[phase] = sum(values) / len(values)
    charts = [
        line_chart("Throughput", {"images/s": curve(records, "images_per_second")}, floor_zero=True),
        line_chart(
            "Seconds per step",
            curves(records, {"step": "step_seconds", "waiting for data": "data_wait_seconds"}),
            floor_zero=True,
        ),
        line_chart("Model FLOPs utilization", {"utilization": curve(records, "mfu")}, floor_zero=True),
        split_bar("Where a step's time goes", split, "ms") if split else "",
    ]
    return _grid(charts)


def _health(config: ExperimentConfig, records: Records) -> str:
    def by_branch(key: str) -> dict[str, list[tuple[float, float]]]:
        return curves(records, {branch: f"{key}_{branch}" for branch in BRANCHES})

    largest = sum(math.log(k) for k in config.heads.prototypes) / len(config.heads.prototypes)
    return _grid(
        [
            line_chart(
                "Entropy of the mean target",
                by_branch("entropy"),
                f"nats, at most {largest:.2f}; falls when all images get the same prototypes",
                floor_zero=True,
            ),
            line_chart("Targets from uniform (KL)", by_branch("uniform_kl"), "nats; zero: targets say nothing", True),
            line_chart("Effective rank of cls features", by_branch("effective_rank"), floor_zero=True),
            line_chart("Spread of cls features", by_branch("feature_std"), "0 collapsed, 1 spread out", True),
            line_chart("Prototypes in use", by_branch("prototypes_used"), "share of all, in one batch", True),
        ]
    )


def _subnets(directory: Path, config: ExperimentConfig, records: Records) -> str:
    online = sorted({key for r in records for key in r if key.startswith("knn_") and "x" in key})
    online_curves = {
        k.removeprefix("knn_"): [(r["knn_step"], r[k]) for r in records if k in r and "knn_step" in r] for k in online
    }
    charts = [
        line_chart("Elastic DINO loss by cost", curves(records, {b: f"subnet_loss_{b}" for b in BANDS})),
        line_chart("k-NN accuracy during training", online_curves),
    ]
    tables = []
    for path in sorted((directory / "eval").glob("*.json")):
        try:
            evaluated = read_results(path)
        except UserError as error:
            print(f"warning: an evaluation is missing in the report: {error}", file=sys.stderr)
            tables.append(f"<p><i>Not available: {escape(str(error))}</i></p>")
            continue
        if evaluated:
            note = f"{path.stem}, step {next(iter(evaluated.values())).get('step')}"
            for key, title in (("params", "Parameters"), ("gflops", "GFLOPs per image")):
                points = [(e[key], e["accuracy"], n) for n, e in evaluated.items()]
                name = f"{path.stem}: accuracy over {title}"
                charts.append(scatter_chart(name, {path.stem: points}, title, note, LEAST_ACCURACY_SPAN))
            heads = {"accuracy": "accuracy", "miou": "mIoU", "knn_miou": "k-NN mIoU"}
            heads = {key: head for key, head in heads.items() if all(key in entry for entry in evaluated.values())}
            rows = [
                [n, f"{e['params'] / 1e6:.2f} M", f"{e['gflops']:.3g}", *(f"{100 * e[key]:.1f}%" for key in heads)]
                for n, e in evaluated.items()
            ]
            tables.append(
                f"<h3>{escape(path.stem)}</h3>" + table(["sub-network", "parameters", "GFLOPs", *heads.values()], rows)
            )
    if not tables:
        tables = ["<p>Not evaluated yet: <code>poa eval knn RUN</code>.</p>"]
    return _grid(charts) + "".join(tables)


def _costs(directory: Path, config: ExperimentConfig, records: Records) -> str:
    """What trained the smallest, a middle and the largest network, and what each would have taken alone."""
    ledger = Ledger(directory, config, records[-1]["step"])
    if not ledger.stretches:
        return "<p>Not known: the manifest does not tell the run's steps.</p>"
    chosen = representative_subnets(ledger.grid)
    accounts = {subnet: ledger.of(subnet) for subnet in chosen}
    rows = [
        [
            subnet.name,
            "intact" if subnet == ledger.grid.largest else f"{account.draws:,} times",
            f"{account.own_images:,}",
            *(f"{hours:.3g}" if hours is not None else "unknown" for hours in (account.own_hours, account.alone_hours)),
        ]
        for subnet, account in accounts.items()
    ]
    first = accounts[chosen[0]]
    hours = "unknown" if first.gpu_hours is None else f"{first.gpu_hours:.3g}"
    text = (
        f"{first.steps:,} steps on {first.images:,} images took {hours} GPU-hours (of ranks, on a CPU). Of these, "
        "those in passes of a network itself, by FLOPs; and what it alone would take on the same images and steps, "
        "teacher included, computed from FLOPs at the speed of this run."
    )
    head = ["sub-network", "as elastic student", "images", "GPU-hours of its own", "GPU-hours alone"]
    return f"<p>{escape(text)}</p>" + table(head, rows)


def _pictures(directory: Path, config: ExperimentConfig, records: Records, manifest: dict[str, Any]) -> str:
    from pipeline.report import pictures

    step = records[-1]["step"] - 1
    crops = _if_possible(
        f"Crops of rank 0 at step {step + 1}, as the model saw them; dark patches were masked for the students.",
        lambda: pictures.crops_as_seen(config, step, manifest["world_size"] or 1, directory),
    )
    components = _if_possible(
        "First three principal components of the teacher's patch features, per sub-network.",
        lambda: pictures.patch_components(config, RunModels.open(directory)),
    )
    return crops + components


def _if_possible(caption: str, make: Callable[[], str]) -> str:
    """A picture with its caption, or why there is none."""
    try:
        return f"<p>{escape(caption)}</p>{make()}"
    except UserError as error:
        print(f"warning: a picture is missing in the report: {error}", file=sys.stderr)
        return f"<p>{escape(caption)}</p><p><i>Not available: {escape(str(error))}</i></p>"


def _changes(manifest: dict[str, Any]) -> str:
    """Where the run comes from, and which keys and schedules changed when it went on."""
    origin = _dict(manifest.get("forked_from"))
    began = f"Began from step {origin.get('step')} of {origin.get('run')}."
    parts = [f"<p>{escape(began)}</p>"] if origin else []
    entries = [entry for entry in _list(manifest.get("settings")) if isinstance(entry, dict)]
    rows = []
    for old, new in pairwise(entries):
        before, now = _dict(old.get("values")), _dict(new.get("values"))
        rows += [[new.get("from_step"), key, before[key], now[key]] for key in before if now.get(key) != before[key]]
        courses = _dict(new.get("courses"))
        rows += [
            [new.get("from_step"), f"{name} (laid out anew)", *map(course_text, pair)] for name, pair in courses.items()
        ]
    if rows:
        parts.append(table(["from step", "what", "was", "is"], rows))
    return "".join(parts)


def _faults(directory: Path, records: Records, manifest: dict[str, Any]) -> str:
    starts = [[s.get(k) or "" for k in ("time", "step", "world_size", "host", "job")] for s in manifest["starts"]]
    parts = ["<h3>Starts</h3>", table(["time", "from step", "ranks", "host", "Slurm job"], starts)]
    bad = [[r["step"], ", ".join(map(str, _list(r["bad"])))] for r in records if "bad" in r]
    if bad:
        parts += ["<h3>Steps left out</h3>", table(["step", "not finite"], bad[:100])]
    skipped = read_json_lines(directory / "skipped.jsonl", "position")
    skipped = [s for s in skipped if {"reason", "key", "shard"} <= s.keys()]
    if skipped:
        counts = Counter(str(s["reason"]) for s in skipped)
        first = {str(s["reason"]): s for s in reversed(skipped)}
        rows = [
            [reason, n, f"{first[reason]['key']} of {first[reason]['shard']}"] for reason, n in counts.most_common()
        ]
        parts += ["<h3>Samples left out</h3>", table(["reason", "samples", "first"], rows)]
    if not bad and not skipped:
        parts.append("<p>No step and no sample was left out.</p>")
    return "".join(parts)


def _environment(manifest: dict[str, Any]) -> str:
    rows = [["code", manifest["code"]], *manifest["versions"].items()]
    rows += [["data", str(manifest["data"].get("sha256", "unknown"))[:16]], ["seed", manifest["seed"]]]
    return table(["what", "version"], rows)


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _median(records: Records, key: str) -> float:
    numbers = sorted(value for _, value in curve(records, key))
    return numbers[len(numbers) // 2] if numbers else math.nan


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"


def _number(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    return number(value) if isinstance(value, int | float) else "unknown"
