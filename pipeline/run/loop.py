"""The life of a run: claim the directory, resume, step, log, save, stop well."""

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import ExperimentConfig
from pipeline.engine import distributed
from pipeline.engine.checkpoint import Checkpoints, Progress, Saved, SaveError, Written
from pipeline.engine.distributed import Ranks
from pipeline.engine.layouts import deepspeed
from pipeline.errors import UserError
from pipeline.evaluate.online import OnlineEvaluation
from pipeline.monitor.monitor import Monitor
from pipeline.monitor.report import StepReport
from pipeline.run.console import Console
from pipeline.run.directory import RunDirectory, fingerprint
from pipeline.run.experiment import Settings
from pipeline.run.policy import Decision, End, Policy, Save, after
from pipeline.run.records import count, count_skipped, record
from pipeline.run.rehearsal import is_compiled, rehearse
from pipeline.run.slurm_job import Job, stop_signals
from pipeline.run.step import Trainer
from pipeline.run.threads import threads_that_fit
from pipeline.run.watchdog import Watchdog

_WEEK = 7 * 24 * 3600.0


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
        0 when the run is complete, 75 when it stopped on SIGTERM, SIGUSR1 or SIGINT after saving, 1 after too many bad
        steps or when a checkpoint cannot be written.

    Raises:
        UserError: the directory, the data or the launch is not usable.
    """
    with stop_signals() if stop_requested is None else nullcontext(stop_requested) as stop:
        # collectives leave it to the watchdog to give up, which knows a suspended job from one that hangs
        ranks = distributed.initialize(1.5 * config.run.hang_timeout_seconds + 60, collective_seconds=_WEEK)
        with threads_that_fit(config, ranks.device):
            return _train(config, ranks, stop, quiet, trainer).exit_code


def _train(config: ExperimentConfig, ranks: Ranks, stop_requested: list[int], quiet: bool, make: type[Trainer]) -> End:
    run, job = RunDirectory(Path(config.run.dir)), Job.from_environment()
    seconds = config.run.hang_timeout_seconds
    watchdog = Watchdog(ranks.rank, ranks.world_size, seconds, distributed.collectives_begun)
    trainer, checkpoints, policy = None, None, Policy.of(config)
    try:
        with distributed.crash_together(ranks), _giving_up(job, ranks):
            ranks.agree(lambda: run.claim(config, job))
            watchdog.share(run.heartbeats)
            watchdog.beat("the start: checkpoints")
            tell = job.saved if job else lambda step: None
            checkpoints = Checkpoints(run.checkpoints, config.run.keep, ranks, run.require_ownership, tell)
            saved = checkpoints.find()
            progress = saved.progress if saved else Progress(0, 0, {}, 0, {})
            with Console(ranks.is_main, policy.last_step, progress.step, quiet) as console:
                if progress.step >= policy.last_step:
                    console.already_complete(run.path, progress.step)
                    ranks.agree(lambda: _tell_job(job, End.DONE, config.run.requeue))
                    return End.DONE
                settings = ranks.agree(lambda: _settle(run, config, saved))
                _import_the_rest(watchdog.beat)
                watchdog.beat("the start: model and optimizer")
                trainer = make(settings.config, ranks, watchdog.beat, fresh=saved is None)
                if saved:
                    checkpoints.load(saved, trainer.engine, trainer.tri_branch.centering)
                watchdog.beat("the start: data")
                trainer.start_data(progress.samples)
                ranks.agree(lambda: _open_records(run, config, settings, progress, trainer, console))
                if is_compiled(config):
                    _compile(trainer, watchdog, console)
                with Monitor(config, ranks, trainer.phases, trainer.bands, progress, policy.last_step) as monitor:

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


def _import_the_rest(enter: Callable[[str], None]) -> None:
    """What is imported late, where it is used; on a loaded machine that takes long, so each has a phase of its own."""
    enter("the start: DeepSpeed")
    deepspeed()
    enter("the start: DALI")
    with suppress(ImportError):  # a trainer of other data does without it
        importlib.import_module("nvidia.dali.fn")


def _compile(trainer: Trainer, watchdog: Watchdog, console: Console) -> None:
    def tell(number: int, total: int, width: int) -> None:
        watchdog.beat(f"the start: compiling, {number} of {total}")
        console.compiling(number, total, width)

    rehearse(trainer, tell)
    console.compiled(len(trainer.grid.widths))


@contextmanager
def _giving_up(job: Job | None, ranks: Ranks) -> Iterator[None]:
    """A user's mistake will be there the next time too."""
    try:
        yield
    except UserError:
        if job is not None and ranks.is_main:
            job.ended(End.GIVE_UP.value)
        raise


def _settle(run: RunDirectory, config: ExperimentConfig, saved: Saved | None) -> Settings:
    if saved is None:
        run.require_no_past()
    return run.settle(config, saved.progress.step if saved else 0)


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
        """Step after step; every branch is taken by all ranks alike, since it follows from what they agreed on."""
        progress = self.progress
        self.saved_step, self.good = progress.step, copy.deepcopy(progress)
        while progress.step < policy.last_step:
            if self.is_main:
                self.directory.notice_take_over()
            report = self.trainer.step(progress.step, bool(stop_requested), self.checkpoints.parts_finished)
            self.watchdog.beat(f"records of step {progress.step + 1}")
            count(progress, report, self.trainer.loader.next_sample)
            self.collect_skipped(report)
            if not report.agreed.bad:
                self.good = copy.deepcopy(progress)
            self.monitor.step(progress, report)
            decision = after(policy, progress.step, progress.bad_in_a_row, report.agreed.stop)
            if decision.evaluate:
                self.evaluate()
            if decision.log:
                self.log(report)
            is_saved = self.save(decision, report)
            if not is_saved and decision.end is not End.GIVE_UP:
                return End.TRY_AGAIN
            if decision.end is not None:
                self.console.ended(
                    decision.end, progress, self.saved_step, report.agreed.bad, stop_requested, self.checkpoints.root
                )
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
        try:
            if moves:
                self._written(checkpoints.move_on(), report)
            if begins:
                self._written(checkpoints.finish(), report)  # one at a time
                self.watchdog.beat(f"the checkpoint of step {progress.step}")
                engine, centering = self.trainer.engine, self.trainer.tri_branch.centering
                retire = decision.save is not Save.GOOD_AND_KEEP_ALL
                checkpoints.begin(engine, centering, progress, retire)
            if decision.end:
                self._written(checkpoints.finish(), report)
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


def _tell_job(job: Job | None, end: End, requeue: bool) -> None:
    """Before any rank exits: the first exit code that is not 0 ends all tasks of a job step."""
    if job is not None:
        job.ended("stay" if end is End.STOPPED and not requeue else end.value)


def _open_records(
    run: RunDirectory,
    config: ExperimentConfig,
    settings: Settings,
    progress: Progress,
    trainer: Trainer,
    console: Console,
) -> None:
    dataset = trainer.dataset
    assert dataset is not None, "a run has data"
    shards = [(p.name, p.stat().st_size, int(n)) for p, n in zip(dataset.paths, dataset.shard_sizes, strict=True)]
    run.record_start(config, progress.step, trainer.ranks.world_size, fingerprint(shards), settings)
    run.rewind(progress.step, progress.samples)
    console.starting(run.path, progress.step, config.engine, settings.changes)
