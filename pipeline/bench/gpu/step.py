"""Stage d: what a step of ViT-L with 50 images costs, beside the plain step, and under FSDP2 beside DeepSpeed."""

from dataclasses import dataclass

import torch

from pipeline.bench.gpu.presets import LARGE, experiment
from pipeline.bench.gpu.stage import Stage
from pipeline.bench.step import Contender, StepBench
from pipeline.elastic import Subnet
from pipeline.engine import distributed
from pipeline.plan.forecast import GPUS

STEPS = 8
ENGINES = ("fsdp2-keep", "fsdp2-reshard")
_ROOM = 20.0  # seconds below which nothing new is begun


@dataclass(frozen=True)
class _Peaks:
    """TFLOP/s of the card on paper (None if unknown) and of its square product (None if stage a was not run)."""

    paper: float | None
    product: float | None

    def shares(self, tflops: float) -> str:
        named = ((self.paper, "of the card's figure"), (self.product, "of the square product"))
        return ", ".join(f"{tflops / peak:.0%} {text}" for peak, text in named if peak)


def run(stage: Stage) -> None:
    """Sub-networks one by one, each compiled before it is timed; a profile; then the plain step, compiled and not."""
    config = experiment(LARGE, stage)
    ranks = distributed.initialize()
    bench = StepBench(config, ranks, synthetic=True)
    grid = bench.trainer.grid
    square = stage.of("machine").get("matmul_flop_per_s")
    peaks = _Peaks(_on_paper(stage), square and square / 1e12)
    stage.found |= {"experiment": config.model_dump(mode="json"), "subnets": {}, "plain": {}}
    middle = Subnet(grid.widths[len(grid.widths) // 2], grid.depths[len(grid.depths) // 2])
    for subnet in dict.fromkeys((grid.largest, grid.smallest, middle)):
        if stage.left() > _ROOM:
            _alone(stage, bench, subnet, peaks)
    if stage.left() > _ROOM and (busy := bench.gpu_busy(grid.largest)):
        stage.found["gpu_busy"] = busy
        stage.say(f"GPU busy {busy['share']:.0%} of a profiled step, {busy['kernels_per_step']:.0f} kernels a step")
    for compiled in (True, False):
        if stage.left() > _ROOM:
            _beside_plain(stage, bench, grid.largest, compiled)
    bench.close()
    distributed.shut_down()


def _alone(stage: Stage, bench: StepBench, subnet: Subnet, peaks: _Peaks) -> None:
    bench.warm([subnet] * 2)
    first = bench.ours.costs[-2].seconds
    found = bench.measure([subnet] * (2 if stage.tiny else STEPS))
    stage.found["subnets"][str(subnet)] = {"first_seconds": first, **found}
    tflops = found["tflops_per_second_per_rank"]
    phases = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in found["phase_seconds"].items() if s > 5e-4)
    stage.say(
        f"{subnet}: {1e3 * found['step_seconds']['median']:.0f} ms, {found['images_per_second']:.0f} images/s, "
        f"{tflops:.3g} TFLOP/s {peaks.shares(tflops)}; peak {found.get('peak_gib', 0):.1f} GiB, "
        f"first step {first:.1f} s; ms by phase: {phases}"
    )


def _beside_plain(stage: Stage, bench: StepBench, subnet: Subnet, compiled: bool) -> None:
    """The plain step may run out of memory, which is a result."""
    name = "plain compiled" if compiled else "plain eager"
    try:
        bench.add_plain(compiled and not stage.tiny)
        bench.warm([subnet] * 2)
        found = bench.measure([subnet] * 2 if stage.tiny else [subnet] * (STEPS // 2))["plain"]
    except torch.OutOfMemoryError as error:
        stage.found["plain"][name] = str(error)
        stage.say(f"{name}: out of memory")
        return
    finally:
        bench.drop_plain()
    stage.found["plain"][name] = found
    ours, ratio = found["ours"], found["ours_over_plain"]
    stage.say(
        f"{name}: {1e3 * found['seconds']:.0f} ms, peak {found.get('peak_gib', 0):.1f} GiB; ours beside it "
        f"{1e3 * ours['seconds']:.0f} ms, {ratio['seconds']:.2f} of it; engine part "
        f"{1e3 * ours['engine_seconds']:.0f} ms, {ratio['engine_seconds']:.2f} of it"
    )


def run_engines(stage: Stage) -> None:
    """The largest network under DeepSpeed and under FSDP2 by turns, from the same weights."""
    bench = StepBench(experiment(LARGE, stage), distributed.initialize(), synthetic=True)
    subnet, steps = bench.trainer.grid.largest, 2 if stage.tiny else STEPS
    try:
        for name in ENGINES:
            bench.add_engine(name)
        bench.warm([subnet] * 2)
        found = bench.measure([subnet] * steps)
    except torch.OutOfMemoryError as error:
        stage.found["out_of_memory"] = str(error)
        stage.say("three engines side by side are out of memory")
        return
    stage.found |= {name: found[name] for name in ENGINES}
    ratios = {name: found[name][f"ours_over_{name}"]["seconds"] for name in ENGINES}
    rows = ["| engine | ms | ms of the host | ms of the engine's part | peak GiB | ZeRO-1's ms as a multiple |"]
    rows += ["|---|---:|---:|---:|---:|---:|", _row("zero1", bench.ours, steps, "")]
    rows += [_row(name, bench.contenders[name], steps, f"{ratios[name]:.2f}") for name in ENGINES]
    (stage.out / "engines.md").write_text("\n".join(rows) + "\n")
    for name in ENGINES:
        ms, beside = (1e3 * part["seconds"] for part in (found[name], found[name]["ours"]))
        last, ours = (contender.losses[-1] for contender in (bench.contenders[name], bench.ours))
        stage.say(
            f"{name}: {ms:.0f} ms, zero1 beside it {beside:.0f} ms, {ratios[name]:.2f} of it; "
            f"loss {last:.4f} and {ours:.4f}"
        )
    bench.close()
    distributed.shut_down()


def _row(name: str, contender: Contender, steps: int, ratio: str) -> str:
    kinds = ("seconds", "cpu_seconds", "engine_seconds")
    cells = [f"{1e3 * contender.median(kind, steps):.0f}" for kind in kinds]
    peak = max(cost.peak_bytes for cost in contender.costs[-steps:]) / 2**30
    return f"| {' | '.join([name, *cells, f'{peak:.1f}', ratio])} |"


def _on_paper(stage: Stage) -> float | None:
    card = stage.of("machine").get("card", "").lower()
    return next((gpu.flops / 1e12 for name, gpu in GPUS.items() if name in card), None)
