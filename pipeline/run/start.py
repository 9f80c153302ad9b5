"""What comes before a run's first step: where it goes on, by which settings, on which data, and what is compiled."""

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.data.reader import Dataset
from pipeline.engine.checkpoint import Checkpoints, Progress, Saved
from pipeline.engine.distributed import Ranks
from pipeline.engine.zero import deepspeed
from pipeline.models.order import Order
from pipeline.run.console import Console
from pipeline.run.directory import RunDirectory
from pipeline.run.experiment import Settings
from pipeline.run.fork import Fork
from pipeline.run.rehearsal import rehearse
from pipeline.run.segments import sources_of
from pipeline.run.step import Trainer
from pipeline.run.watchdog import Watchdog


@dataclass(frozen=True)
class Start:
    """Where a run goes on, and which run's records say what came before. Every method is called on all ranks.

    Attributes:
        directory: of the run.
        ranks: this process and its peers.
        before: the directory of the run itself, or of the one that it is forked from.
        saved: the checkpoint that it goes on from, if it does not begin at step 0.
        progress: that of the checkpoint, which the run counts on.
        origin: run and step of the checkpoint, if it is another run's.
    """

    directory: RunDirectory
    ranks: Ranks
    before: RunDirectory
    saved: Saved | None
    progress: Progress
    origin: dict[str, Any] | None = None

    @classmethod
    def find(cls, directory: RunDirectory, checkpoints: Checkpoints, fork: Fork | None, last_step: int) -> "Start":
        """Look for a checkpoint, in the run's own directory first."""
        saved, ranks = checkpoints.find(), checkpoints.ranks
        if fork and saved:
            ranks.agree(lambda: fork.require_same(directory))
        if saved:
            return cls(directory, ranks, directory, saved, saved.progress)
        if not fork:
            ranks.agree(directory.require_no_past)
            return cls(directory, ranks, directory, None, Progress(0, 0, {}, 0, {}))
        saved = fork.find(ranks, last_step)
        begins = saved.progress.step
        ranks.agree(lambda: directory.require_no_past(begins))
        return cls(directory, ranks, RunDirectory(fork.source), saved, saved.progress, fork.origin(saved))

    def measured(self, config: ExperimentConfig) -> ExperimentConfig:
        """A config with what the run measured when it began."""
        return self.ranks.agree(lambda: self.before.measured(config)) if self.saved else config

    def settle(self, config: ExperimentConfig) -> Settings:
        """What the keys that may change are from now on."""
        batch = config.data.batch_size * self.ranks.world_size
        return self.ranks.agree(lambda: self.before.settle(config, self.progress.step, batch))

    def segments(self, config: ExperimentConfig, dataset: Dataset) -> list[dict[str, Any]]:
        """In which order the run's data comes, and has come."""
        samples, forked = self.progress.samples, self.origin is not None
        return self.ranks.agree(lambda: self.before.segments(config, sources_of(dataset), samples, forked))

    def open_records(
        self, config: ExperimentConfig, segments: list[dict[str, Any]], settings: Settings, order: Order | None
    ) -> None:
        """Write down that the run starts here, and how; what a later step wrote is taken back."""

        def record() -> None:
            if order:
                self.directory.record_order(order.as_json())
            step, ranks = self.progress.step, self.ranks.world_size
            self.directory.record_start(config, step, ranks, segments, settings, self.origin)
            self.directory.rewind(step, self.progress.samples)

        self.ranks.agree(record)


def import_the_rest(config: ExperimentConfig, enter: Callable[[str], None]) -> None:
    """What is imported late, where it is used; on a loaded machine that takes long, so each has a phase of its own."""
    if config.engine.backend == "fsdp2":
        enter("the start: FSDP2")
        importlib.import_module("pipeline.engine.fully_shard")
    else:
        enter("the start: DeepSpeed")
        deepspeed()
    enter("the start: DALI")
    with suppress(ImportError):  # a trainer of other data does without it
        importlib.import_module("nvidia.dali.fn")


def compile_all(trainer: Trainer, watchdog: Watchdog, console: Console) -> None:
    """Compile whatever a step may draw, and tell of it. Collective."""

    def tell(number: int, total: int, width: int) -> None:
        watchdog.beat(f"the start: compiling, {number} of {total}")
        console.compiling(number, total, width)

    rehearse(trainer, tell)
    console.compiled(len(trainer.grid.widths) * len(trainer.grid.mlp_ratios))
