"""A run directory: what it describes and what it records."""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, dump_config, load_config
from pipeline.data.order import Order
from pipeline.data.stream import DECODE, Skip
from pipeline.errors import UserError
from pipeline.files import Journal, read_json_lines, write_atomically, write_json_lines
from pipeline.measure.provenance import code_revision, environment, versions
from pipeline.models.order import ORDER
from pipeline.run.experiment import Settings, require_same_experiment, settle, with_measured
from pipeline.run.ownership import Ownership
from pipeline.run.segments import identity, settle_segments
from pipeline.run.slurm_job import Job
from pipeline.run.watchdog import clear

_ENTRIES = {"starts": (("step", int),), "settings": (("from_step", int), ("values", dict))}
"""What is read of the entries of a manifest's lists."""


class RunDirectory:
    """The files of one run, written by rank 0 alone.

    Args:
        path: the directory; made if it does not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.heartbeats = path / ".heartbeats"
        self._manifest = path / "manifest.json"
        self._config = path / "config.yaml"
        self._owner = Ownership(path)
        self._log, self._log_skipped = Journal(self.metrics), Journal(self.skipped)

    def claim(self, config: ExperimentConfig, job: Job | None = None) -> None:
        """Take the directory for this process; see `Ownership.claim`.

        Raises:
            UserError: something is in the way, another process trains here, or the directory is of another experiment.
        """
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
            self._owner.claim(job)
            clear(self.heartbeats)
            there = self._config_there()
        if there is not None:
            require_same_experiment(there, config, self.path)

    def require_ownership(self) -> None:
        """Raise RuntimeError if another process has taken the run over."""
        self._owner.require()

    def notice_take_over(self) -> None:
        """`require_ownership` for every step; see `Ownership.notice`."""
        self._owner.notice()

    def release(self) -> None:
        self._owner.release()

    def require_no_past(self, begins: int = 0) -> None:
        """Refuse to begin where a run has already saved checkpoints, of which none is found.

        Args:
            begins: the step at which a run begins here, more than 0 for a fork.

        Raises:
            UserError: they are gone; to begin anew would wipe the records of the run.
        """
        with self._usable():
            starts = [start["step"] for start in self.read_manifest()["starts"]]
            saved = [r["step"] for r in read_json_lines(self.metrics, "step") if "checkpoint_seconds" in r]
        if (step := max([*starts, *saved], default=0)) > begins:
            raise UserError(
                f"this run has been at step {step} and has no checkpoint now",
                str(self.checkpoints),
                "bring them back (is a file system away?); to start anew choose another run directory",
            )

    def settle(self, config: ExperimentConfig, step: int, global_batch: int | None = None) -> Settings:
        """What the keys that may change are from a step on, after what this run's were; see `experiment.settle`."""
        with self._usable():
            return settle(config, self._config_there(), self.read_manifest(), step, self.path, global_batch)

    def measured(self, config: ExperimentConfig) -> ExperimentConfig:
        """A config with what an earlier start of this run measured; see `experiment.with_measured`."""
        with self._usable():
            there = self._config_there()
        return with_measured(config, there) if there else config

    def record_order(self, order: dict[str, Any]) -> None:
        """Keep in which order pretrained weights were put."""
        with self._usable():
            write_atomically(self.path / ORDER, json.dumps(order) + "\n")

    def forked_from(self) -> dict[str, Any]:
        """The `run` and `step` that this run began from; empty if it began from none."""
        with self._usable():
            return self.read_manifest().get("forked_from") or {}

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What cannot be read or written at the start of a run is the user's to mend."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot use the run directory: {error.strerror}",
                str(error.filename or self.path),
                "see to its rights and to the room there, or set run.dir or --run-dir to another",
            ) from error

    def _config_there(self) -> ExperimentConfig | None:
        return load_config(self._config) if self._config.exists() else None

    def read_manifest(self) -> dict[str, Any]:
        """What earlier starts left; `starts` is empty if there were none.

        Raises:
            UserError: the file holds something else.
            OSError: it cannot be read.
        """
        try:
            manifest = {"starts": [], **json.loads(self._manifest.read_text(encoding="utf-8"))}
            for name, keys in _ENTRIES.items():
                if not all(isinstance(entry[key], kind) for entry in manifest.get(name, ()) for key, kind in keys):
                    raise ValueError(f"`{name}` holds something else")
            return manifest
        except FileNotFoundError:
            return {"starts": []}
        except (ValueError, TypeError, LookupError) as error:
            what = f"not a manifest, or a damaged one: {type(error).__name__}: {error}"
            raise UserError(what, str(self._manifest), "restore it") from error

    def segments(
        self, config: ExperimentConfig, sources: list[dict[str, Any]], samples: int, forked: bool = False
    ) -> list[dict[str, Any]]:
        """The segments of the run's data, the last one for what follows here or, `forked`, in another run that begins
        from it; see `settle_segments`."""
        with self._usable():
            manifest = self.read_manifest()
        data, where = config.data, str(self.path)
        return settle_segments(manifest, sources, data.segment, samples, data.seed, where, forked, Order.of(data))

    def record_start(
        self,
        config: ExperimentConfig,
        step: int,
        world_size: int,
        segments: list[dict[str, Any]],
        settings: Settings,
        origin: dict[str, Any] | None = None,
    ) -> None:
        """Add this start to `manifest.json`, and write `config.yaml`.

        Args:
            config: as the user gave it.
            step: where the run goes on.
            world_size: its ranks.
            segments: of the training data.
            settings: values of the keys that may change.
            origin: the run and step that it is forked from, if it begins so.

        Raises:
            UserError: the global batch is not what the run began with.
        """
        with self._usable():
            previous = self.read_manifest()
        batch = config.data.batch_size * world_size
        if step > 0:
            require_same_batch(previous, batch, world_size, str(self.path))
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step,
            "world_size": world_size,
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "kernels": config.kernels_in_use(),
            "environment": environment(),
        }
        manifest = {
            "versions": versions(),
            "code": code_revision(),
            "data": identity(segments[-1]["sources"]),
            "segments": segments,
            "seed": config.data.seed,
            "world_size": world_size,
            "global_batch": batch,
            "settings": settings.history,
            "forked_from": origin or previous.get("forked_from"),
            "starts": [*previous["starts"], start],
        }
        with self._usable():
            write_atomically(self._manifest, json.dumps(manifest, indent=1) + "\n")
            write_atomically(self._config, dump_config(config))

    def rewind(self, step: int, samples: int) -> None:
        """Drop the records that lie after a checkpoint; the steps that made them will be done again."""
        with self._usable():
            write_json_lines(self.metrics, (r for r in read_json_lines(self.metrics, "step") if r["step"] <= step))
            skipped = read_json_lines(self.skipped, "position")
            write_json_lines(self.skipped, (r for r in skipped if r["position"] < samples))

    def undecodable(self, since: int) -> list[Skip]:
        """Samples that were found not to decode from a position on, which no rank has to find again."""
        known = (r for r in read_json_lines(self.skipped, "position") if r["position"] >= since)
        return [Skip(**r) for r in known if r.keys() == set(Skip._fields) and r["reason"] == DECODE]

    def log(self, record: dict[str, Any]) -> None:
        self._log.append(record)

    def log_skipped(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            self._log_skipped.append(record)


def require_same_batch(previous: dict[str, Any], batch: int, world_size: int, where: str) -> None:
    before = previous.get("global_batch", batch)
    if before != batch:
        way_out = (
            f"set data.batch_size={before // world_size}"
            if before % world_size == 0
            else f"use a number of ranks that divides {before}"
        )
        raise UserError(f"the global batch was {before} images and would be {batch}", where, way_out)
