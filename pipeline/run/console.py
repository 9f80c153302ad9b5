"""All that a run says on a terminal or in a batch log: its progress line, and messages of rank 0."""

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pipeline.config import EngineConfig
from pipeline.engine.checkpoint import Progress
from pipeline.method.schedules import course_text
from pipeline.run.experiment import Settings
from pipeline.run.policy import End

_BATCH_LOG_SECONDS = 30.0


class Console:
    """What people read of a run while it lasts; silent on all ranks but one.

    The progress line is rewritten in place on a terminal; in a batch log it is a new line at most every 30 seconds.

    Args:
        speaks: this rank speaks for all.
        last_step: where the run ends.
        first_step: where it (re)started.
        quiet: no progress line.
        stream: where to write, standard error by default.
    """

    def __init__(
        self, speaks: bool, last_step: int, first_step: int, quiet: bool = False, stream: TextIO | None = None
    ):
        self.speaks, self.last_step, self.first_step, self.quiet = speaks, last_step, first_step, quiet
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._start = time.monotonic()
        self._printed = -_BATCH_LOG_SECONDS

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and self.speaks and not self.quiet:
            self._print("\n")

    def say(self, text: str) -> None:
        if self.speaks:
            self._print(text + "\n")

    def _print(self, text: str) -> None:
        """Nobody may read it any more, or its disk may be full: no reason to end a run."""
        with suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def update(self, record: dict[str, Any]) -> None:
        """Show a record of `metrics.jsonl`; a bad step is always shown."""
        now = time.monotonic()
        final = record["step"] >= self.last_step
        if self.quiet or not (self.live or final or "bad" in record or now - self._printed >= _BATCH_LOG_SECONDS):
            return
        self._printed = now
        text = self._text(record, now)
        self._print(f"\r\x1b[K{text}" if self.live else f"{text}\n")
        if self.live and "bad" in record:
            self._print("\n")

    def already_complete(self, run_dir: Path, step: int) -> None:
        """There is nothing to do."""
        self.say(f"{run_dir} is complete: it has a checkpoint of step {step}, and ends at {self.last_step}")

    def starting(
        self,
        run_dir: Path,
        step: int,
        engine: EngineConfig,
        settings: Settings | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """What begins, what changes with it, and what differs from what the config says."""
        self._start = time.monotonic()
        if origin:
            self.say(f"beginning {run_dir} at step {step}, from the checkpoint of {origin['run']}")
        elif step:
            self.say(f"resuming {run_dir} at step {step}")
        for key, (before, now) in settings.changes.items() if settings else ():
            self.say(f"note: from step {step} on {key} is {now}, and was {before}")
        for name, (before, now) in settings.courses.items() if settings else ():
            self.say(f"note: {name} is laid out anew: {course_text(now)} (it was to be {course_text(before)})")
        if engine.backend == "deepspeed" and engine.effective_stage() != engine.zero_stage:
            self.say("note: bf16 shards its fp32 masters even at ZeRO stage 0: running stage 1")

    def compiling(self, number: int, total: int, width: int) -> None:
        """Before the first step every width is compiled, which takes minutes where nothing is cached."""
        now = time.monotonic()
        if self.live and not self.quiet and self.speaks:
            self._print(f"\r\x1b[Kcompiling width {width} ({number} of {total})")
        elif not self.live and (number == 1 or now - self._printed >= _BATCH_LOG_SECONDS):
            self._printed = now
            self.say(f"compiling width {width} ({number} of {total})")

    def compiled(self, total: int) -> None:
        """All of them are; what is left to do is counted from here on."""
        seconds, self._start = time.monotonic() - self._start, time.monotonic()
        if self.live and not self.quiet and self.speaks:
            self._print("\r\x1b[K")
        self.say(f"{total} widths are compiled, in {seconds:.0f} s")

    def left_out(self, first: dict[str, Any], total: int, listed_in: Path) -> None:
        """Samples of this step could not be used."""
        self.say(
            f"warning: left out {first['key']} of {first['shard']} ({first['reason']}); "
            f"{total} samples so far, listed in {listed_in}"
        )

    def saved_in(self, seconds: float, lead_seconds: float) -> None:
        """Warn if Slurm's signal comes too late for a step and a checkpoint, which took `seconds`."""
        if seconds > lead_seconds / 2:
            self.say(
                f"warning: a step and a checkpoint take {seconds:.0f} s, and Slurm's signal comes {lead_seconds:.0f} s "
                f"before the end (checkpoint.signal_lead_seconds): submit with --signal=USR1@{2 * seconds:.0f} or more "
                "and set the key to it"
            )

    def cannot_save(self, step: int, error: OSError, checkpoints: Path, saved_step: int) -> None:
        """A checkpoint could not be written; the one of `saved_step` is the newest."""
        self.say(
            f"error: cannot write the checkpoint of step {step}: {error} ({checkpoints}): "
            f"make room and start again; the run continues from step {saved_step}"
        )

    def ended(
        self,
        end: End,
        progress: Progress,
        saved_step: int,
        bad: list[str],
        signals: list[int],
        checkpoints: Path,
        precision: str,
    ) -> None:
        """Why the run ends, if it is not complete; `signals` are those that this rank received."""
        if end is End.GIVE_UP:
            last = f"the newest checkpoint is that of step {saved_step}" if saved_step else "there is no checkpoint yet"
            earlier = (
                "; if it ends so again, begin from an earlier checkpoint (--fork-from RUN@STEP and a new --run-dir)"
            )
            finer = "" if precision == "fp32" else " or use engine.precision=fp32"
            self.say(
                f"error: {progress.bad_in_a_row} steps in a row were not finite ({', '.join(bad)}), the last of them "
                f"step {progress.step}; none of them is saved, {last} ({checkpoints}): lower optim.base_lr{finer}, "
                f"and start again{earlier if saved_step else ''}"
            )
        elif end is End.STOPPED:
            which = signal.Signals(signals[0]).name if signals else "sent to another rank"
            self.say(f"stopped on a signal after saving step {saved_step} in {checkpoints} ({which})")

    def _text(self, record: dict[str, Any], now: float) -> str:
        done = record["step"] - self.first_step
        seconds = (now - self._start) / max(done, 1)
        left = (self.last_step - record["step"]) * seconds
        wait = 100 * record["data_wait_seconds"] / record["step_seconds"]
        elastic = f"subnet {record['subnet']}  " if record["subnet"] else ""
        bad = f"  NOT FINITE: {', '.join(record['bad'])} (step skipped)" if "bad" in record else ""
        return (
            f"step {record['step']}/{self.last_step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_second']:.0f} images/s  data wait {wait:.0f}%  {elastic}"
            f"ETA {_duration(left)}{bad}"
        )


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
