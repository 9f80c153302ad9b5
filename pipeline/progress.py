"""The one line that a terminal or a batch log shows of a run."""

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_BATCH_LOG_SECONDS = 30.0


class ProgressLine:
    """Rewritten in place on a terminal; in a batch log a new line at most every 30 seconds.

    Args:
        last_step: where the run ends.
        first_step: where it (re)started.
        quiet: print nothing.
        stream: where to write, standard error by default.
    """

    def __init__(self, last_step: int, first_step: int, quiet: bool = False, stream: TextIO | None = None):
        self.last_step, self.first_step, self.quiet = last_step, first_step, quiet
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._start = time.monotonic()
        self._printed = -_BATCH_LOG_SECONDS

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and not self.quiet:
            print(file=self.stream)

    def update(self, record: dict[str, Any]) -> None:
        """Show a record of `metrics.jsonl`; a bad step is always shown."""
        now = time.monotonic()
        final = record["step"] >= self.last_step
        if self.quiet or not (self.live or final or "bad" in record or now - self._printed >= _BATCH_LOG_SECONDS):
            return
        self._printed = now
        text = self._text(record, now)
        print(f"\r\x1b[K{text}" if self.live else text, end="" if self.live else "\n", file=self.stream, flush=True)
        if self.live and "bad" in record:
            print(file=self.stream)

    def _text(self, record: dict[str, Any], now: float) -> str:
        done = record["step"] - self.first_step
        seconds = (now - self._start) / max(done, 1)
        left = (self.last_step - record["step"]) * seconds
        wait = 100 * record["data_wait_seconds"] / record["step_seconds"]
        bad = f"  NOT FINITE: {', '.join(record['bad'])} (step skipped)" if "bad" in record else ""
        return (
            f"step {record['step']}/{self.last_step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_second']:.0f} images/s  data wait {wait:.0f}%  subnet {record['subnet']}  "
            f"ETA {_duration(left)}{bad}"
        )


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
