"""The training run: claim the directory, resume, step, log, save, stop well."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.checkpoint import Checkpoints, Progress, list_checkpoints
from pipeline.config import ExperimentConfig
from pipeline.data.loader import Loader
from pipeline.distributed import Ranks
from pipeline.evaluate.online import OnlineEvaluation
from pipeline.job import Job, stop_signals
from pipeline.metrics.monitor import Monitor
from pipeline.progress import ProgressLine
from pipeline.run import RunDirectory, fingerprint
from pipeline.trainer import StepReport, Trainer
from pipeline.watchdog import Watchdog

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 75


def train(config: ExperimentConfig, quiet: bool = False, stop_requested: list[int] | None = None) -> int:
    """Train until `run.max_steps` or the end of the schedule, resuming if the run directory holds a checkpoint.

    Args:
        config: the experiment.
        quiet: no progress line.
        stop_requested: filled by the caller's `stop_signals`; None to handle signals here.

    Returns:
        0 when the run is complete, 75 when it stopped on SIGTERM or SIGUSR1 after saving, 1 after too many bad steps or
        when a checkpoint cannot be written.

    Raises:
        UserError: the directory, the data or the launch is not usable.
    """
    with stop_signals() if stop_requested is None else nullcontext(stop_requested) as stop:
        # collectives give up later than the watchdog, which knows more
        ranks = distributed.initialize(1.5 * config.run.hang_timeout_seconds + 60)
        return _train(config, ranks, stop, quiet)


def _train(config: ExperimentConfig, ranks: Ranks, stop_requested: list[int], quiet: bool) -> int:
    run, job = RunDirectory(Path(config.run.dir)), Job.from_environment()
    watchdog = Watchdog(ranks.rank, ranks.world_size, config.run.hang_timeout_seconds)
    trainer = None
    try:
        with distributed.crash_together(ranks):
            ranks.agree(lambda: run.claim(config, job))
            watchdog.share(run.heartbeats)
            watchdog.beat("the start: model and optimizer")
            fresh = not ranks.agree(lambda: list_checkpoints(run.checkpoints))
            trainer = Trainer(config, ranks, watchdog.beat, fresh)
            checkpoints = Checkpoints(run.checkpoints, config.run.keep, ranks, run.require_ownership)
            progress = checkpoints.resume(trainer.engine, trainer.tri_branch.centering) or Progress(0, 0, {}, 0, {})
            watchdog.beat("the start: data")
            trainer.start_data(progress.samples)
            ranks.agree(lambda: _open_records(run, config, progress, trainer))
            with (
                Monitor(config, ranks, trainer.phases, trainer.bands, progress, last_step(config)) as monitor,
                ProgressLine(last_step(config), progress.step, quiet) as line,
            ):
                code = _loop(config, run, trainer, checkpoints, progress, stop_requested, line, watchdog, job, monitor)
                monitor.complete = code == EXIT_DONE
                ranks.agree(lambda: _tell_job(job, code, config.run.requeue))
            return code
    finally:
        watchdog.stop()
        if trainer is not None:
            trainer.close()
        run.release()
        distributed.shut_down()


def last_step(config: ExperimentConfig) -> int:
    return min(config.optim.total_steps, config.run.max_steps or config.optim.total_steps)


def _loop(
    config: ExperimentConfig,
    run: RunDirectory,
    trainer: Trainer,
    checkpoints: Checkpoints,
    progress: Progress,
    stop_requested: list[int],
    line: ProgressLine,
    watchdog: Watchdog,
    job: Job | None,
    monitor: Monitor,
) -> int:
    """Step after step; every branch below is taken by all ranks alike, since it follows from what they agreed on."""
    main = trainer.ranks.is_main
    evaluation = OnlineEvaluation(config, trainer.ranks)
    saved_step = progress.step
    end = last_step(config)
    while progress.step < end:
        if main:
            run.require_ownership()
        report = trainer.step(progress.step, bool(stop_requested))
        watchdog.beat(f"records of step {progress.step + 1}")
        _count(progress, report, trainer.loader)
        _collect_skipped(run, trainer, progress, report)
        monitor.step(progress, report)
        if evaluation.due(progress.step):
            watchdog.beat(f"the evaluation of step {progress.step}")
            began = time.perf_counter()
            with trainer.engine.whole_teacher() as teacher:
                accuracies = evaluation.accuracies(teacher.backbone, progress.step)
            monitor.knn(progress.step, accuracies, time.perf_counter() - began)
        due = progress.step % config.run.log_every_steps == 0 or progress.step == end
        if due or report.bad:
            more = monitor.log(report)
            if main:
                record = _record(progress, report, trainer.global_batch) | more
                run.log(record)
                monitor.logged(record)
                line.update(record)
        exhausted = progress.bad_in_a_row >= config.optim.max_bad_steps
        if progress.step % config.run.checkpoint_every_steps == 0 or progress.step == end or report.stop or exhausted:
            watchdog.beat(f"the checkpoint of step {progress.step}")
            try:
                _save(config, trainer, checkpoints, progress, report, job, monitor)
            except OSError as error:
                if main:
                    print(
                        f"error: cannot write the checkpoint of step {progress.step}: {error} ({run.checkpoints}): "
                        f"make room and start again; the run continues from step {saved_step}",
                        file=sys.stderr,
                    )
                return EXIT_FAILED
            saved_step = progress.step
        if exhausted:
            if main:
                terms = ", ".join(report.bad)
                print(
                    f"error: {progress.bad_in_a_row} steps in a row were not finite ({terms}): the last good state is "
                    f"saved in {run.checkpoints}; lower optim.base_lr or use engine.precision=fp32",
                    file=sys.stderr,
                )
            return EXIT_FAILED
        if report.stop and progress.step < end:
            if main:
                print(f"stopped on a signal after saving step {saved_step} in {run.checkpoints}", file=sys.stderr)
            return EXIT_STOPPED
    return EXIT_DONE


def _save(
    config: ExperimentConfig,
    trainer: Trainer,
    checkpoints: Checkpoints,
    progress: Progress,
    report: StepReport,
    job: Job | None,
    monitor: Monitor,
) -> None:
    """Save, let the batch script know, and compare the time it took with the warning that Slurm gives."""
    began = time.perf_counter()
    path = checkpoints.save(trainer.engine, trainer.tri_branch.centering, progress)
    monitor.saved(progress.step, path, time.perf_counter() - began)
    if job is None or not trainer.ranks.is_main:
        return
    job.saved(progress.step)
    lead, needed = config.checkpoint.signal_lead_seconds, time.perf_counter() - began + report.step_seconds
    if needed > lead / 2:
        print(
            f"warning: a step and a checkpoint take {needed:.0f} s, and Slurm's signal comes {lead:.0f} s before the "
            f"end (checkpoint.signal_lead_seconds): submit with --signal=USR1@{2 * needed:.0f} or more and set the key "
            "to it",
            file=sys.stderr,
        )


def _tell_job(job: Job | None, code: int, requeue: bool) -> None:
    """Before any rank exits: the first exit code that is not 0 ends all tasks of a job step."""
    if job is not None and code == EXIT_STOPPED:
        job.stopped(requeue)
    elif job is not None and code == EXIT_DONE:
        job.complete()


def _count(progress: Progress, report: StepReport, loader: Loader) -> None:
    progress.step += 1
    progress.samples = loader.next_sample
    progress.bad_in_a_row = progress.bad_in_a_row + 1 if report.bad else 0
    for term in report.bad:
        progress.bad_steps[term] = progress.bad_steps.get(term, 0) + 1


def _collect_skipped(run: RunDirectory, trainer: Trainer, progress: Progress, report: StepReport) -> None:
    """Bring the samples that ranks left out to rank 0; they communicate only if there are any."""
    if not report.skipped:
        return
    skips = [skip for part in trainer.ranks.gather([s._asdict() for s in trainer.skips]) for skip in part]
    trainer.skips.clear()
    for skip in skips:
        progress.skipped_samples[skip["reason"]] = progress.skipped_samples.get(skip["reason"], 0) + 1
    if trainer.ranks.is_main and skips:
        run.log_skipped(skips)
        first, total = skips[0], sum(progress.skipped_samples.values())
        print(
            f"warning: left out {first['key']} of {first['shard']} ({first['reason']}); "
            f"{total} samples so far, listed in {run.skipped}",
            file=sys.stderr,
        )


def _record(progress: Progress, report: StepReport, global_batch: int) -> dict[str, Any]:
    """One line of `metrics.jsonl`: values of this step, mean over ranks; times and `subnet` of rank 0."""
    record: dict[str, Any] = {
        "step": progress.step,
        "epoch": round(report.values.epoch, 4),
        "images": progress.samples,
        "loss": report.losses["total"],
        **{name.replace("/", "_"): value for name, value in report.losses.items() if name != "total"},
        "lr": report.values.lr,
        "weight_decay": report.values.weight_decay,
        "momentum": report.values.momentum,
        "teacher_temp": report.values.teacher_temp,
        "grad_norm": sum(g * g for g in report.gradient_norms.values()) ** 0.5,
        **{f"grad_norm_{module}": norm for module, norm in report.gradient_norms.items()},
        "subnet": report.subnet.name,
        "images_per_second": global_batch / report.step_seconds,
        "data_wait_seconds": report.data_wait_seconds,
        "step_seconds": report.step_seconds,
        "bad_steps": sum(progress.bad_steps.values()),
        "skipped_samples": sum(progress.skipped_samples.values()),
        "time": time.time(),
    }
    if report.bad:
        record["bad"] = report.bad
    return record


def _open_records(run: RunDirectory, config: ExperimentConfig, progress: Progress, trainer: Trainer) -> None:
    dataset = trainer.dataset
    shards = [(p.name, p.stat().st_size, int(n)) for p, n in zip(dataset.paths, dataset.shard_sizes, strict=True)]
    run.record_start(config, progress.step, trainer.ranks.world_size, fingerprint(shards))
    run.rewind(progress.step, progress.samples)
    if progress.step:
        print(f"resuming {run.path} at step {progress.step}", file=sys.stderr)
    if config.engine.effective_stage() != config.engine.zero_stage:
        print("note: bf16 shards its fp32 masters even at ZeRO stage 0: running stage 1", file=sys.stderr)
