"""Starts the parts one after the other, each a process with a limit, and sums up what they found."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Any

import pipeline
from pipeline.bench.gpu import STAGES
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.measure.provenance import code_revision

ROOT = Path(pipeline.__file__).parents[1]
_SLOWER = 10  # a rehearsal may take this many times as long: its machine may do other work
_LAST_LINES = 4  # of a log that tells of a failure


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        stage: letter of `STAGES`.
        name: of its log and, unless it is a run of tests, of its figures.
        seconds: after which it is killed.
        command: what it runs.
    """

    stage: str
    name: str
    seconds: float
    command: list[str]


@dataclass
class Outcome:
    """How a part ended: "done", "failed (exit code N)", "killed after N s" or "left out", and what it said."""

    stage: str
    name: str
    outcome: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


def run(out: Path, stages: Sequence[str], tiny: bool) -> int:
    """Run stages (all, if none is named) and write logs, JSON and `summary.md` into `out`.

    Returns:
        0 if every part was done, else 1.

    Raises:
        UserError: there is no such stage, or no GPU.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise UserError(f"no stage {unknown[0]!r}", "gpu", f"name some of {' '.join(STAGES)}")
    if not tiny:
        import torch

        if not torch.cuda.is_available():
            raise UserError("there is no GPU here", "gpu", "add --tiny to rehearse on the CPU")
    chosen = [letter for letter in STAGES if letter in (stages or STAGES)]
    out.mkdir(parents=True, exist_ok=True)
    if tiny:  # a rehearsal leaves the other cores to others
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = run_parts(parts(out.absolute(), chosen, tiny), out)
    return 1 if any(o.outcome not in ("done", "left out") for o in outcomes) else 0


def run_parts(wanted: Sequence[Part], out: Path) -> list[Outcome]:
    """Run parts whatever becomes of those before; the summary is written anew after each."""
    outcomes = []
    for part in wanted:
        outcome = _run(part, out)
        outcomes.append(outcome)
        print(f"{part.stage} {part.name}: {outcome.outcome}, {outcome.seconds:.0f} s", flush=True)
        for line in outcome.lines:
            print(f"  {line}", flush=True)
        _sum_up(out, outcomes)
    return outcomes


def parts(out: Path, stages: Sequence[str], tiny: bool) -> list[Part]:
    """The parts of some stages. Limits are for a GPU: 325 s for a, b and c together, 480 s for d and e."""

    def own(stage: str, name: str, seconds: float, *words: str) -> Part:
        limit = seconds * (_SLOWER if tiny else 1)
        command = [sys.executable, "-m", "pipeline.bench.gpu.stage", name, str(out), str(limit), *words]
        return Part(stage, name, limit, [*command, *["--tiny"] * tiny])

    def tests(stage: str, name: str, seconds: float, *paths: str) -> Part:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
        if find_spec("xdist") and not tiny:
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        return Part(stage, name, seconds * (_SLOWER if tiny else 1), [*command, *(str(ROOT / path) for path in paths)])

    kernel_tests = ["tests/kernels/test_residual.py"] if tiny else ["tests/kernels", "tests/engine", "tests/bench"]
    every = [
        own("a", "machine", 40),
        tests("b", "tests", 75, *kernel_tests),
        own("b", "exact", 60),
        own("c", "kernels", 150),
        own("d", "step", 165),
        own("d", "engines", 80),
        own("e", "shards", 40),
        own("e", "training", 110),
        own("e", "training_eager", 45),
        tests("e", "loader_tests", 40, "tests/data/test_loader.py"),
    ]
    return [part for part in every if part.stage in stages]


def _run(part: Part, out: Path) -> Outcome:
    missing = [word for word in part.command if word.startswith(str(ROOT / "tests")) and not Path(word).exists()]
    if missing:
        return Outcome(part.stage, part.name, "left out", lines=[f"{missing[0]} is not here: run from a checkout"])
    figures = out / f"{part.name}.json"
    figures.unlink(missing_ok=True)
    began, log = time.monotonic(), out / f"{part.name}.log"
    with log.open("w") as file:
        process = Popen(part.command, stdout=file, stderr=STDOUT, env=_environment(), start_new_session=True)
        try:
            code = process.wait(part.seconds)
            ended = "done" if code == 0 else f"failed (exit code {code})"
        except TimeoutExpired:
            ended = f"killed after {part.seconds:.0f} s"
        finally:
            _kill_session(process)
    lines = _said(figures) if figures.exists() else []
    text = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if ended != "done":
        lines += [line[:300] for line in text[-_LAST_LINES:]]
    elif "pytest" in part.command:
        lines += text[-1:]
    return Outcome(part.stage, part.name, ended, time.monotonic() - began, lines)


def _kill_session(process: Popen) -> None:
    """End a part with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    """A part finds this checkout whether it is installed or not, and one rank needs no network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    interfaces = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return {**interfaces, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _said(figures: Path) -> list[str]:
    return json.loads(figures.read_text())["lines"]


def _sum_up(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Write `report.json` and `summary.md`; parts of an earlier call in the same place stay in them."""
    path, new = out / "report.json", {outcome.name: asdict(outcome) for outcome in outcomes}
    before = json.loads(path.read_text())["parts"] if path.exists() else []
    found = {entry["name"]: entry for entry in before} | new
    entries = sorted(found.values(), key=lambda entry: entry["stage"])  # stable: parts stay in their order
    report: dict[str, Any] = {
        "date": str(date.today()),
        "command": " ".join(["python -m pipeline.bench", *sys.argv[1:]]),
        "code": code_revision(),
        "machine": _machine(out),
        "parts": entries,
    }
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    write_atomically(out / "summary.md", _markdown(report))


def _machine(out: Path) -> dict[str, Any]:
    path = out / "machine.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {key: found[key] for key in ("card", "versions") if key in found}


def _markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"# {machine.get('card', 'Unknown card')}, {report['date']}\n",
        f"`{report['command']}`, code {report['code']}; {versions or 'versions unknown: run stage a'}.\n",
        "| stage | part | ended | seconds | found |",
        "|---|---|---|---:|---|",
    ]
    for entry in report["parts"]:
        found = "<br>".join(line.replace("|", "\\|") for line in entry["lines"])
        cells = [entry["stage"], entry["name"], entry["outcome"], f"{entry['seconds']:.0f}", found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
