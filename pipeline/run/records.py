"""What a run keeps of its steps: the counts that travel with a checkpoint, and the lines of `metrics.jsonl`."""

import time
from collections.abc import Iterable
from typing import Any

from pipeline.engine.checkpoint import Progress
from pipeline.monitor.report import StepReport


def count(progress: Progress, report: StepReport, samples: int) -> None:
    """Add a step to what the run counts.

    Args:
        progress: changed in place.
        report: of the step.
        samples: consumed over all ranks, the position of the data stream.
    """
    bad = report.agreed.bad
    progress.step += 1
    progress.samples = samples
    progress.bad_in_a_row = progress.bad_in_a_row + 1 if bad else 0
    for term in bad:
        progress.bad_steps[term] = progress.bad_steps.get(term, 0) + 1


def count_skipped(progress: Progress, skips: Iterable[dict[str, Any]]) -> None:
    """Add samples that were left out, as `skipped.jsonl` lists them."""
    for skip in skips:
        progress.skipped_samples[skip["reason"]] = progress.skipped_samples.get(skip["reason"], 0) + 1


def record(progress: Progress, report: StepReport, global_batch: int) -> dict[str, Any]:
    """One line of `metrics.jsonl`: values of this step, mean over ranks; times and rank 0's `subnet`, if any."""
    agreed, values, timing = report.agreed, report.values, report.timing
    line: dict[str, Any] = {
        "step": progress.step,
        "epoch": round(values.epoch, 4),
        "images": progress.samples,
        "loss": agreed.losses["total"],
        **{name.replace("/", "_"): value for name, value in agreed.losses.items() if name != "total"},
        "lr": values.lr,
        "weight_decay": values.weight_decay,
        "momentum": values.momentum,
        "teacher_temp": values.teacher_temp,
        "grad_norm": sum(g * g for g in agreed.gradient_norms.values()) ** 0.5,
        **{f"grad_norm_{module}": norm for module, norm in agreed.gradient_norms.items()},
        "subnet": report.subnet.name if report.subnet else None,
        "images_per_second": global_batch / timing.step,
        "data_wait_seconds": timing.data_wait,
        "step_seconds": timing.step,
        "bad_steps": sum(progress.bad_steps.values()),
        "skipped_samples": sum(progress.skipped_samples.values()),
        "time": time.time(),
    }
    if agreed.bad:
        line["bad"] = agreed.bad
    return line
