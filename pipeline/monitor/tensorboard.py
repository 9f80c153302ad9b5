"""Records of `metrics.jsonl` as TensorBoard event files."""

from pathlib import Path
from typing import Any

from pipeline.elastic.optional import left_out
from pipeline.monitor.sinks import numbers


class EventFile:
    """One event per record, with every number of it as a scalar.

    Args:
        directory: for the event files; TensorBoard joins those of all starts of a run.
        first_step: events of earlier starts after it are void, for those steps are done again.
    """

    def __init__(self, directory: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        with left_out("boto3", "botocore", "fsspec"):  # its files could lie in buckets
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(directory))
        if first_step:
            restart = Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.add_event(restart)

    def add(self, record: dict[str, Any]) -> None:
        """Write a record; what is no finite number is left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers(record).items()]
        summary = Summary(value=values)
        self._writer.add_event(self._event(wall_time=record["time"], step=record["step"], summary=summary))

    def close(self) -> None:
        self._writer.close()
