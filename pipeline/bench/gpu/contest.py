"""Stage c: `kernels.bench`, ours and what is compiled in advance first, rivals that compile as far as time goes."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from kernels.bench.clock import Clock, ceilings
from kernels.bench.rivals import cases
from kernels.bench.timing import Result, environment, heading, measure, section
from pipeline.bench.gpu.stage import Stage

OPERATIONS = ("loss", "sinkhorn", "attention", "residual", "optimizer")
_REHEARSED = ("optimizer",)  # of the rivals that compile
_COMPILED = ("torch.compile", "FlexAttention")  # take seconds each before their first result
_NEEDED = {False: 4.0, True: 15.0}  # seconds that a case of either kind may take


def run(stage: Stage) -> None:
    """Time all cases; a table as `kernels.bench` writes it goes to `kernels.md`."""
    scale = "tiny" if stage.tiny else "full"
    clock = Clock(stage.device, 2 if stage.tiny else 10)
    limits = ceilings(clock, stage.dtype, scale)
    head = {
        **environment(stage.device),
        "dtype": str(stage.dtype).removeprefix("torch."),
        "repeats": str(clock.repeats),
    }
    stage.found |= {"environment": head, "ceilings": limits, "results": [], "no_time": []}
    tables: dict[tuple[str, str], list[Result]] = {}
    for compiled in (False, True):
        for op in _REHEARSED if compiled and stage.tiny else OPERATIONS:
            for case in cases(op, scale, stage.device, stage.dtype):
                if stage.left() < _NEEDED[compiled]:
                    stage.found["no_time"].append([op, case.name, compiled])
                    continue
                first = next(iter(case.contenders))  # the others are held against it, so it runs both times
                wanted = {n: c for n, c in case.contenders.items() if n.startswith(_COMPILED) == compiled or n == first}
                found = measure(op, replace(case, contenders=wanted, missing={}), clock, limits)
                tables.setdefault((op, case.name), []).extend(found[1:] if compiled else found)
                stage.found["results"] = [asdict(r) for results in tables.values() for r in results]
                stage.save()
                if stage.device.type == "cuda":
                    torch.cuda.empty_cache()
    table = heading(head, limits) + "".join(map(section, tables.values()))
    (stage.out / "kernels.md").write_text(table)
    for results in tables.values():
        if line := _verdict(results):
            stage.say(line)
    for line in attention_rule([result for results in tables.values() for result in results]):
        stage.say(line)
    stage.say(f"{len(stage.found['results'])} results, {len(stage.found['no_time'])} left out for want of time")


def _verdict(results: list[Result]) -> str | None:
    """Ours beside the best rival; None where ours did not run."""
    times: dict[str, Any] = {r.contender: r.total_ms for r in results if r.total_ms}
    ours = times.pop("triton", None)
    if ours is None or not times:
        return None
    rival = min(times, key=times.__getitem__)
    name = f"{results[0].op}: {results[0].case}"
    return f"{name}: triton {ours:.3f} ms, {rival} {times[rival]:.3f} ms, {times[rival] / ours:.2f}x"


def attention_rule(results: Sequence[Result]) -> list[str]:
    """Which lengths torch's attention wins, and the `engine.kernels.attention` that takes the least time over all.

    Sequences with a bias, Swin's windows, are a matter of their own: `sdpa_above_N` leaves them to Triton.
    """
    plain: dict[tuple[int, str], dict[str, float]] = {}
    biased: dict[tuple[int, str], dict[str, float]] = {}
    for result in results:
        match = re.search(r" N=(\d+) ", result.case)
        if result.op != "attention" or match is None or not result.total_ms:
            continue
        kind = "triton" if result.contender == "triton" else "sdpa" if result.contender.startswith("SDPA") else None
        if kind:
            lengths = biased if " bias" in result.case else plain
            times = lengths.setdefault((int(match[1]), result.case), {})
            times[kind] = min(result.total_ms, times.get(kind, result.total_ms))
    lines = []
    if compared := {n: times for (n, _), times in sorted(plain.items()) if len(times) == 2}:
        rules = {"triton": max(compared), "sdpa": 0} | {f"sdpa_above_{n}": n for n in [*compared][:-1]}
        cost = {
            rule: sum(times["sdpa" if n > above else "triton"] for n, times in compared.items())
            for rule, above in rules.items()
        }
        best = min(cost, key=cost.__getitem__)
        lines.append(f"attention without bias: {_wins(compared)}; engine.kernels.attention={best}")
    if compared := {n: times for (n, _), times in sorted(biased.items()) if len(times) == 2}:
        lines.append(f"attention with bias: {_wins(compared)}")
    return lines


def _wins(compared: dict[int, dict[str, float]]) -> str:
    won = {n: min(times, key=times.__getitem__) for n, times in compared.items()}
    return ", ".join(f"{winner} at {n} tokens" for n, winner in won.items())
