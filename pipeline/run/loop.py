"""The life of a run: claim the directory, resume, step, log, save, stop well."""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.config import ExperimentConfig
from pipeline.data.intake import settle_values
from pipeline.data.remote.patience import WEATHER
from pipeline.data.segments import segment_of
from pipeline.data.stream import Skip
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Checkpoints, Progress, SaveError, Written
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.online import OnlineEvaluation
from pipeline.monitor.monitor import Monitor
from pipeline.monitor.report import StepReport
from pipeline.run.console import Console
from pipeline.run.directory import RunDirectory
from pipeline.run.experiment import with_measured
from pipeline.run.fork import Fork
from pipeline.run.policy import Decision, End, Policy, Save, after, may_run_ahead
from pipeline.run.records import count, count_skipped, record
from pipeline.run.rehearsal import is_compiled
from pipeline.run.slurm_job import Job, stop_signals
from pipeline.run.start import Start, compile_all, import_the_rest
from pipeline.run.step import Trainer, Underway
from pipeline.run.threads import threads_that_fit
from pipeline.run.watchdog import Watchdog

_WEEK = 7 * 24 * 3600.0


def train(
    config: ExperimentConfig,
    quiet: bool = False,
    stop_requested: list[int] | None = None,
    trainer: type[Trainer] = Trainer,
    fork: Fork | None = None,
) -> int:
    """Train until `run.max_steps` or the end of the schedule, resuming if the run directory holds a checkpoint.

    Args:
        config: the experiment.
        quiet: no progress line.
        stop_requested: filled by the caller's `stop_signals`; None to handle signals here.
        trainer: makes the steps; another one for other data.
        fork: where the run comes from, if it does not begin at step 0; a checkpoint in its own directory goes before.

    Returns:
        0 when the run is complete, 75 when it stopped on SIGTERM, SIGUSR1, SIGINT or SIGHUP after saving, 1 after too
        many bad steps or when a checkpoint cannot be written.

    Raises:
        UserError: the directory, the data or the launch is not usable.
    """
    with stop_signals() if stop_requested is None else nullcontext(stop_requested) as stop:
        # collectives leave it to the watchdog to give up, which knows a suspended job from one that hangs
        ranks = distributed.initialize(1.5 * config.run.hang_timeout_seconds + 60, collective_seconds=_WEEK)
        WEATHER.stop_requested = stop
        with threads_that_fit(config, ranks.device):
            return _train(config, ranks, stop, quiet, trainer, fork).exit_code


def _train(
    config: ExperimentConfig,
    ranks: Ranks,
    stop_requested: list[int],
    quiet: bool,
    make: type[Trainer],
    fork: Fork | None,
) -> End:
    run, job = RunDirectory(Path(config.run.dir)), Job.from_environment()
    seconds = config.run.hang_timeout_seconds
    watchdog = Watchdog(ranks.rank, ranks.world_size, seconds, distributed.collectives_begun, WEATHER.longest)
    WEATHER.patience = min(config.data.cache.patience_s, seconds / 2)  # to save before the watchdog ends it
    trainer, checkpoints, policy = None, None, Policy.of(config)
    try:
        with distributed.crash_together(ranks), _giving_up(job, ranks):
            config = ranks.agree(lambda: settle_values(config))
            ranks.agree(lambda: run.claim(config, job))
            watchdog.share(run.heartbeats)
            watchdog.beat("the start: checkpoints")
            tell = job.saved if job else lambda step: None
            checkpoints = Checkpoints(run.checkpoints, config.run.keep, ranks, run.require_ownership, tell)
            start = Start.find(run, checkpoints, fork, policy.last_step)
            progress = start.progress
            with Console(ranks.is_main, policy.last_step, progress.step, quiet) as console:
                if progress.step >= policy.last_step:
                    console.already_complete(run.path, progress.step)
                    ranks.agree(lambda: _tell_job(job, End.DONE, config.run.requeue))
                    return End.DONE
                config = start.measured(config)
                settings = start.settle(config)
                import_the_rest(config, watchdog.beat)
                watchdog.beat("the start: model and optimizer")
                trainer = make(settings.config, ranks, watchdog.beat, fresh=start.saved is None, rise=settings.rise)
                config = with_measured(config, trainer.config)
                if start.saved:
                    checkpoints.load(start.saved, trainer.engine, trainer.tri_branch.centering)
                watchdog.beat("the start: data")
                assert trainer.dataset is not None, "a run has data"
                segments = start.segments(config, trainer.dataset)
                trainer.segment = segment_of(segments[-1])
                trainer.start_data(progress.samples)
                start.open_records(config, segments, settings, trainer.order)
                console.starting(run.path, progress.step, config.engine, settings, start.origin)
                trainer.loader.learn(ranks.agree(lambda: run.undecodable(trainer.segment.begin)))
                if is_compiled(config):
                    compile_all(trainer, watchdog, console)
                tally, last_step = trainer.loader.tally, policy.last_step
                with Monitor(config, ranks, trainer.phases, trainer.bands, progress, last_step, tally) as monitor:

                    def alive() -> None:
                        watchdog.alive()
                        monitor.alive()

                    evaluation = OnlineEvaluation(config, ranks, alive)
                    life = Run(config, run, job, watchdog, trainer, checkpoints, progress, monitor, evaluation, console)
                    end = life.live(policy, stop_requested)
                    monitor.complete = end is End.DONE
                    ranks.agree(lambda: _tell_job(job, end, config.run.requeue))
            return end
    finally:
        if checkpoints is not None:
            checkpoints.close()
        watchdog.stop()
        if trainer is not None:
            trainer.close()
        run.release()
        distributed.shut_down()


@contextmanager
def _giving_up(job: Job | None, ranks: Ranks) -> Iterator[None]:
    """A user's mistake will be there the next time too."""
    try:
        yield
    except UserError:
        if job is not None and ranks.is_main:
            job.ended(End.GIVE_UP.value)
        raise


@dataclass
class Run:
    """A run under way on one rank; every method is called on all ranks at the same step.

    Attributes:
        good: where the run was after its last good step; the weights are those of then, since bad steps change none.
        saved_step: of the newest checkpoint that is complete.
    """

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
    good: Progress = field(init=False)
    saved_step: int = field(init=False, default=0)

    def live(self, policy: Policy, stop_requested: list[int]) -> End:
        """Step after step; every branch is taken by all ranks alike, since it follows from what they agreed on.

        What came of a step is read when the next one has begun, so that the device never waits for the host.
        """
        progress = self.progress
        self.saved_step, self.good = progress.step, copy.deepcopy(progress)
        last: Underway | None = None
        stop = False
        while progress.step < policy.last_step:
            begun = progress.step + (last is not None)
            before, last = last, None
            if before is None or (not stop and may_run_ahead(policy, begun, progress.bad_in_a_row)):
                if self.is_main:
                    self.directory.notice_take_over()
                last = self.trainer.step(begun, bool(stop_requested), self.checkpoints.parts_finished)
            if before is None:
                continue
            report = self.read(before)
            if report.agreed.no_data:  # nor did a step underway change anything: the rank without data has none for it
                return self.stop_without_data(report)
            stop = stop or report.agreed.stop
            # a step underway changes the weights that would be saved: it comes to its end first
            decision = after(policy, progress.step, progress.bad_in_a_row, stop and last is None)
            if decision.evaluate:
                self.evaluate()
            if decision.log:
                self.log(report)
            is_saved = self.save(decision, report)
            if not is_saved and decision.end is not End.GIVE_UP:
                return End.TRY_AGAIN
            if decision.end is not None:
                self.console.ended(
                    decision.end,
                    progress,
                    self.saved_step,
                    report.agreed.bad,
                    stop_requested,
                    self.checkpoints.root,
                    self.config.engine.precision,
                )
                return decision.end
        return End.DONE

    def stop_without_data(self, report: StepReport) -> End:
        """Save what is good and end, since some rank cannot get its data, or may not wait for it any longer.

        Raises:
            SourceError: it will not come by waiting: an object is gone, forbidden or another.
        """
        self.save(Decision(evaluate=False, log=False, save=Save.GOOD, end=End.TRY_AGAIN), report)
        lost = [error for error in self.trainer.ranks.gather(self.trainer.lost) if error is not None]
        first = min(lost, key=lambda error: error.passing)
        if not first.passing:
            self.trainer.ranks.agree(lambda: _raise(first))
        if self.is_main:
            print(f"error: {first}", file=sys.stderr)
        stopped = self.trainer.ranks.gather(bool(WEATHER.stop_requested))  # it may have come while a rank waited
        return End.STOPPED if any(stopped) else End.TRY_AGAIN

    def read(self, step: Underway) -> StepReport:
        """Wait for what came of a step, if need be, and count it."""
        number = self.progress.step + 1
        self.watchdog.beat(f"values of step {number}")
        report = step.report
        if report.agreed.no_data:
            return report
        self.watchdog.beat(f"records of step {number}")
        count(self.progress, report, step.samples)
        self.collect_skipped(report, step.skips)
        if not report.agreed.bad:
            self.good = copy.deepcopy(self.progress)
        self.monitor.step(self.progress, report)
        return report

    @property
    def is_main(self) -> bool:
        return self.trainer.ranks.is_main

    def collect_skipped(self, report: StepReport, own: list[Skip]) -> None:
        """Bring the samples that ranks left out to rank 0; they communicate only if there are any."""
        if not report.agreed.skipped:
            return
        found = [skip for part in self.trainer.ranks.gather(own) for skip in part]
        if not found:
            return
        self.trainer.loader.learn(found)  # so that no rank has to find it again
        skips = [skip._asdict() for skip in found]
        count_skipped(self.progress, skips)
        if self.is_main:
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

    def save(self, decision: Decision, report: StepReport) -> bool:
        """See to checkpoints between two steps: bring the one under way on, begin the one that is due, and before the
        run ends wait for it; False if one could not be written."""
        checkpoints, progress = self.checkpoints, self.progress if decision.save is Save.NOW else self.good
        moves = checkpoints.can_move_on(report.agreed.parts_saved)
        begins = decision.save is not None and progress.step not in (self.saved_step, checkpoints.step)
        if not (moves or begins or decision.end):
            return True
        self.watchdog.beat(f"the checkpoint of step {checkpoints.step or progress.step}")
        began = time.perf_counter()
        # a streak of bad steps may have its cause in the newest checkpoint: no other goes for it
        retire = not self.progress.bad_in_a_row
        try:
            if moves:
                self._written(checkpoints.move_on(retire), report)
            if begins:
                self._written(checkpoints.finish(retire), report)  # one at a time
                self.watchdog.beat(f"the checkpoint of step {progress.step}")
                engine, centering = self.trainer.engine, self.trainer.tri_branch.centering
                checkpoints.begin(engine, centering, progress)
            if decision.end:
                self._written(checkpoints.finish(retire), report)
        except SaveError as error:
            self.console.cannot_save(error.step, error, checkpoints.root, self.saved_step)
            return False
        finally:
            self.trainer.phases.add("checkpoint", time.perf_counter() - began)
        return True

    def _written(self, written: Written | None, report: StepReport) -> None:
        """Compare the time that a checkpoint took with the warning that Slurm gives."""
        if written is None:
            return
        self.saved_step = written.step
        self.monitor.saved(*written)
        if self.job is not None and self.is_main:
            seconds = written.seconds + report.timing.step
            self.console.saved_in(seconds, self.config.checkpoint.signal_lead_seconds)


def _raise(error: Exception) -> NoReturn:
    raise error


def _tell_job(job: Job | None, end: End, requeue: bool) -> None:
    """Before any rank exits: the first exit code that is not 0 ends all tasks of a job step."""
    if job is not None:
        job.ended("stay" if end is End.STOPPED and not requeue else end.value)
