"""The life of a run: claim the directory, resume, step, log, save, stop well."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ExperimentConfig
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Checkpoints, Progress, list_checkpoints
from pipeline.engine.distributed import Ranks
from pipeline.evaluate.online import OnlineEvaluation
from pipeline.monitor.monitor import Monitor
from pipeline.monitor.report import StepReport
from pipeline.run.console import Console
from pipeline.run.directory import RunDirectory, fingerprint
from pipeline.run.policy import End, Policy, after
from pipeline.run.records import count, count_skipped, record
from pipeline.run.slurm_job import Job, stop_signals
from pipeline.run.step import Trainer
from pipeline.run.watchdog import Watchdog


def train(
    config: ExperimentConfig,
    quiet: bool = False,
    stop_requested: list[int] | None = None,
    trainer: type[Trainer] = Trainer,
) -> int:
    """Train until `run.max_steps` or the end of the schedule, resuming if the run directory holds a checkpoint.

    Args:
        config: the experiment.
        quiet: no progress line.
        stop_requested: filled by the caller's `stop_signals`; None to handle signals here.
        trainer: makes the steps; another one for other data.

    Returns:
        0 when the run is complete, 75 when it stopped on SIGTERM or SIGUSR1 after saving, 1 after too many bad steps or
        when a checkpoint cannot be written.

    Raises:
        UserError: the directory, the data or the launch is not usable.
    """
    with stop_signals() if stop_requested is None else nullcontext(stop_requested) as stop:
        # collectives give up later than the watchdog, which knows more
        ranks = distributed.initialize(1.5 * config.run.hang_timeout_seconds + 60)
        return _train(config, ranks, stop, quiet, trainer).value


def _train(config: ExperimentConfig, ranks: Ranks, stop_requested: list[int], quiet: bool, make: type[Trainer]) -> End:
    run, job = RunDirectory(Path(config.run.dir)), Job.from_environment()
    watchdog = Watchdog(ranks.rank, ranks.world_size, config.run.hang_timeout_seconds)
    trainer, policy = None, Policy.of(config)
    try:
        with distributed.crash_together(ranks):
            ranks.agree(lambda: run.claim(config, job))
            watchdog.share(run.heartbeats)
            watchdog.beat("the start: model and optimizer")
            fresh = not ranks.agree(lambda: list_checkpoints(run.checkpoints))
            trainer = make(config, ranks, watchdog.beat, fresh)
            checkpoints = Checkpoints(run.checkpoints, config.run.keep, ranks, run.require_ownership)
            progress = checkpoints.resume(trainer.engine, trainer.tri_branch.centering) or Progress(0, 0, {}, 0, {})
            watchdog.beat("the start: data")
            trainer.start_data(progress.samples)
            with Console(ranks.is_main, policy.last_step, progress.step, quiet) as console:
                ranks.agree(lambda: _open_records(run, config, progress, trainer, console))
                with Monitor(config, ranks, trainer.phases, trainer.bands, progress, policy.last_step) as monitor:
                    evaluation = OnlineEvaluation(config, ranks)
                    life = Run(config, run, job, watchdog, trainer, checkpoints, progress, monitor, evaluation, console)
                    end = life.live(policy, stop_requested)
                    monitor.complete = end is End.DONE
                    ranks.agree(lambda: _tell_job(job, end, config.run.requeue))
            return end
    finally:
        watchdog.stop()
        if trainer is not None:
            trainer.close()
        run.release()
        distributed.shut_down()


@dataclass
class Run:
    """A run under way on one rank; every method is called on all ranks at the same step."""

    config: ExperimentConfig
    directory: RunDirectory
    job: Job | None
    watchdog: Watchdog
    trainer: Trainer
    checkpoints: Checkpoints
    progress: Progress
    monitor: Monitor
    evaluation: OnlineEvaluation
    console: Console

    def live(self, policy: Policy, stop_requested: list[int]) -> End:
        """Step after step; every branch is taken by all ranks alike, since it follows from what they agreed on."""
        progress, saved_step = self.progress, self.progress.step
        while progress.step < policy.last_step:
            if self.is_main:
                self.directory.notice_take_over()
            report = self.trainer.step(progress.step, bool(stop_requested))
            self.watchdog.beat(f"records of step {progress.step + 1}")
            count(progress, report, self.trainer.loader.next_sample)
            self.collect_skipped(report)
            self.monitor.step(progress, report)
            decision = after(policy, progress.step, progress.bad_in_a_row, report.agreed.stop)
            if decision.evaluate:
                self.evaluate()
            if decision.log:
                self.log(report)
            if decision.save:
                try:
                    self.save(report)
                except OSError as error:
                    self.console.cannot_save(progress.step, error, self.directory.checkpoints, saved_step)
                    return End.FAILED
                saved_step = progress.step
            if decision.end is not None:
                self.console.ended(decision.end, progress, report.agreed.bad, self.directory.checkpoints)
                return decision.end
        return End.DONE

    @property
    def is_main(self) -> bool:
        return self.trainer.ranks.is_main

    def collect_skipped(self, report: StepReport) -> None:
        """Bring the samples that ranks left out to rank 0; they communicate only if there are any."""
        if not report.agreed.skipped:
            return
        skips = [skip for part in self.trainer.ranks.gather([s._asdict() for s in self.trainer.skips]) for skip in part]
        self.trainer.skips.clear()
        count_skipped(self.progress, skips)
        if self.is_main and skips:
            self.directory.log_skipped(skips)
            self.console.left_out(skips[0], sum(self.progress.skipped_samples.values()), self.directory.skipped)

    def evaluate(self) -> None:
        """Evaluate the teacher as it is."""
        self.watchdog.beat(f"the evaluation of step {self.progress.step}")
        began = time.perf_counter()
        with self.trainer.engine.whole_teacher() as teacher:
            accuracies = self.evaluation.accuracies(teacher.backbone, self.progress.step)
        self.monitor.knn(self.progress.step, accuracies, time.perf_counter() - began)

    def log(self, report: StepReport) -> None:
        """Write a line of `metrics.jsonl` and show it."""
        more = self.monitor.log(report)
        if self.is_main:
            line = record(self.progress, report, self.trainer.global_batch) | more
            self.directory.log(line)
            self.monitor.logged(line)
            self.console.update(line)

    def save(self, report: StepReport) -> None:
        """Save, let the batch script know, and compare the time it took with the warning that Slurm gives.

        Raises:
            OSError: see `Checkpoints.save`.
        """
        self.watchdog.beat(f"the checkpoint of step {self.progress.step}")
        began = time.perf_counter()
        path = self.checkpoints.save(self.trainer.engine, self.trainer.tri_branch.centering, self.progress)
        self.monitor.saved(self.progress.step, path, time.perf_counter() - began)
        if self.job is not None and self.is_main:
            self.job.saved(self.progress.step)
            needed = time.perf_counter() - began + report.timing.step
            self.console.saved_in(needed, self.config.checkpoint.signal_lead_seconds)


def _tell_job(job: Job | None, end: End, requeue: bool) -> None:
    """Before any rank exits: the first exit code that is not 0 ends all tasks of a job step."""
    if job is not None and end is End.STOPPED:
        job.stopped(requeue)
    elif job is not None and end is End.DONE:
        job.complete()


def _open_records(
    run: RunDirectory, config: ExperimentConfig, progress: Progress, trainer: Trainer, console: Console
) -> None:
    dataset = trainer.dataset
    assert dataset is not None, "a run has data"
    shards = [(p.name, p.stat().st_size, int(n)) for p, n in zip(dataset.paths, dataset.shard_sizes, strict=True)]
    run.record_start(config, progress.step, trainer.ranks.world_size, fingerprint(shards))
    run.rewind(progress.step, progress.samples)
    console.starting(run.path, progress.step, config.engine)
