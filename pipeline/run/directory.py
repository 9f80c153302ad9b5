"""A run directory: who owns it, what it describes, what it records."""

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, dump_config, load_config
from pipeline.errors import UserError
from pipeline.files import append_json_line, read_json_lines, write_atomically, write_json_lines
from pipeline.measure.provenance import code_revision, environment, versions
from pipeline.run.slurm_job import Job
from pipeline.run.watchdog import clear

# Keys that change how or where a run is computed but not what it computes.
_FREE_KEYS = (
    *("run", "checkpoint", "engine", "metrics", "eval"),
    *("data.train", "data.val", "data.threads", "data.batch_size"),
)
_TAKE_OVER_SECONDS = 120.0
_LOOK_SECONDS = 5.0  # between two looks at who owns the run; the file may be on a busy shared file system


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
        self._owner = path / ".owner"
        self._lock: Any = None
        self._name = ""
        self._next_look = 0.0

    def claim(self, config: ExperimentConfig, job: Job | None = None) -> None:
        """Take the directory for this process and write `config.yaml`.

        A later attempt of a Slurm job takes it over from an earlier one: when only the daemon of a node dies, Slurm
        requeues the job while its old processes train on.

        Raises:
            UserError: something is in the way, another process trains here, or the directory is of another experiment.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise UserError(
                f"cannot use the run directory: {error.strerror}", str(self.path), "set run.dir or --run-dir to another"
            ) from error
        self._name = job.name if job else f"{platform.node()}.{os.getpid()}"
        deadline = time.monotonic() + (_TAKE_OVER_SECONDS if self._may_take_over(job) else 0.0)
        while not self._try_lock():
            if time.monotonic() >= deadline:
                raise UserError(
                    "another process is training here", str(self.path), "stop it, or choose another run directory"
                )
            write_atomically(self._owner, self._name + "\n")
            time.sleep(0.5)
        write_atomically(self._owner, self._name + "\n")
        clear(self.heartbeats)
        if (self.path / "config.yaml").exists():
            require_same_experiment(load_config(self.path / "config.yaml"), config, self.path)
        write_atomically(self.path / "config.yaml", dump_config(config))

    def require_ownership(self) -> None:
        """Stop a process whose run was taken over, before it writes into what is no longer its own.

        Raises:
            RuntimeError: the directory has another owner.
        """
        owner = _read(self._owner)
        if owner != self._name:
            raise RuntimeError(f"{self.path} was taken over by {owner}: this process must not write to it")

    def notice_take_over(self) -> None:
        """`require_ownership` for every step: it looks now and then, and a file it cannot read names no other owner.

        Raises:
            RuntimeError: the directory has another owner.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        with suppress(OSError):
            if _read(self._owner):
                self.require_ownership()

    def _may_take_over(self, job: Job | None) -> bool:
        """Whether the owner is an earlier attempt of the same job."""
        id_, _, attempt = _read(self._owner).rpartition(".")
        return job is not None and id_ == job.id and attempt.isdigit() and int(attempt) < job.attempt

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def record_start(self, config: ExperimentConfig, step: int, world_size: int, data: dict[str, Any]) -> None:
        """Add this start to `manifest.json`.

        Args:
            data: what identifies the training data; a resumed run must find the same.

        Raises:
            UserError: the data or the global batch is not what the run began with.
        """
        path = self.path / "manifest.json"
        previous = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"starts": []}
        batch = config.data.batch_size * world_size
        if step > 0:
            _require_same_stream(previous, data, batch, world_size, str(self.path))
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step,
            "world_size": world_size,
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "environment": environment(),
        }
        manifest = {
            "versions": versions(),
            "code": code_revision(),
            "data": data,
            "seed": config.data.seed,
            "world_size": world_size,
            "global_batch": batch,
            "starts": [*previous["starts"], start],
        }
        write_atomically(path, json.dumps(manifest, indent=1) + "\n")

    def rewind(self, step: int, samples: int) -> None:
        """Drop the records that lie after a checkpoint; the steps that made them will be done again."""
        write_json_lines(self.metrics, (r for r in read_json_lines(self.metrics) if r["step"] <= step))
        write_json_lines(self.skipped, (r for r in read_json_lines(self.skipped) if r["position"] < samples))

    def log(self, record: dict[str, Any]) -> None:
        append_json_line(self.metrics, record)

    def log_skipped(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            append_json_line(self.skipped, record)


def require_same_experiment(there: ExperimentConfig, here: ExperimentConfig, where: Path) -> None:
    """Refuse to mix two experiments in one directory, naming the first key that differs.

    Raises:
        UserError: a key that decides what is computed differs.
    """
    old, new = _fixed_keys(there), _fixed_keys(here)
    for key in old:
        if old[key] != new[key]:
            raise UserError(
                f"the run directory holds another experiment: {key} is {old[key]} there and {new[key]} here",
                str(where),
                "choose another run.dir, or the same value",
            )


def _fixed_keys(config: ExperimentConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(tree: dict[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in _FREE_KEYS:
                continue
            if isinstance(value, dict):
                visit(value, f"{key}.")
            else:
                flat[key] = value

    visit(config.model_dump(mode="json"), "")
    return flat


def _require_same_stream(
    previous: dict[str, Any], data: dict[str, Any], batch: int, world_size: int, where: str
) -> None:
    if previous.get("data", data) != data:
        raise UserError(
            "the training shards are not those the run began with", where, "restore them, or start a new run directory"
        )
    before = previous.get("global_batch", batch)
    if before != batch:
        way_out = (
            f"set data.batch_size={before // world_size}"
            if before % world_size == 0
            else f"use a number of ranks that divides {before}"
        )
        raise UserError(f"the global batch was {before} images and would be {batch}", where, way_out)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def fingerprint(shards: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """What identifies a data set: its shards' names, bytes and sample counts.

    Args:
        shards: (file name, bytes, samples) of each.
    """
    entries = sorted(shards)
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"shards": len(entries), "samples": sum(n for _, _, n in entries), "sha256": digest}
