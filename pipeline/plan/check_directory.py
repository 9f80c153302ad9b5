"""Can the run directory be used: rights, another experiment, room, and speed for a save in time?"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from pipeline.config import ExperimentConfig, load_config
from pipeline.data.intake import settle_values
from pipeline.data.order import Order
from pipeline.data.reader import Dataset
from pipeline.engine.saved import find_problem, list_checkpoints, read_manifest
from pipeline.errors import UserError
from pipeline.files import require_writable
from pipeline.plan.check import Check
from pipeline.plan.memory import checkpoint_bytes
from pipeline.run.directory import RunDirectory, require_same_batch
from pipeline.run.experiment import require_same_experiment
from pipeline.run.ownership import locks_work
from pipeline.run.segments import settle_segments, sources_of

_GIB = 1 << 30
_PROBE_BYTES = 32 << 20


def check_directory(config: ExperimentConfig, world_size: int) -> Check:
    """Can the run directory be used, and is what it holds of this experiment, its data and its global batch?"""

    config = settle_values(config)
    path = Path(config.run.dir)
    parent = existing(path)
    require_writable(parent, "set run.dir to another")
    finding = f"{path}: new"
    if (path / "config.yaml").exists():
        require_same_experiment(load_config(path / "config.yaml"), config, path)
        saved = list_checkpoints(RunDirectory(path).checkpoints)
        if not saved:
            RunDirectory(path).require_no_past()
        else:
            problem = find_problem(saved[0], checksums=False)
            _require_same_stream(config, path, world_size, 1 if problem else read_manifest(saved[0])["samples"])
            if problem:
                return Check(
                    "run directory", "warn", f"{saved[0]} is damaged: {problem}", "training takes the one before"
                )
        finding = f"{path}: {f'resumes from {saved[0].name}' if saved else 'starts anew'}"
    if not locks_work(parent):
        fix = "mount it with locks (Lustre: -o flock; NFS: its lock daemon); without, a renewed file stands in for them"
        return Check("run directory", "warn", f"{finding}; flock does not work in {parent}", fix)
    return Check("run directory", "pass", finding)


def _require_same_stream(config: ExperimentConfig, path: Path, world_size: int, samples: int) -> None:
    """Refuse what training would: other shards, sources or another global batch than the run began with."""
    if not (path / "manifest.json").exists():
        return
    manifest = RunDirectory(path).read_manifest()
    data = config.data
    sources = sources_of(Dataset(data.train, data.piece_mb, data.image))
    settle_segments(manifest, sources, data.segment, samples, data.seed, str(path), order=Order.of(data))
    require_same_batch(manifest, config.data.batch_size * world_size, world_size, str(path))


def check_disk(config: ExperimentConfig) -> Check:
    """Is there room for the retained checkpoints and the one being written?"""
    free = shutil.disk_usage(existing(Path(config.run.dir))).free
    needed = (config.run.keep + 1) * checkpoint_bytes(config)
    finding = (
        f"{free / _GIB:.1f} GiB free, {config.run.keep} checkpoints and one in the making take {needed / _GIB:.1f}"
    )
    if free < needed:
        return Check("disk", "fail", finding, "make room, lower run.keep, or set run.dir to another file system")
    if free < 2 * needed:
        return Check("disk", "warn", finding, "make room: others may fill the rest")
    return Check("disk", "pass", finding)


def check_lead(config: ExperimentConfig, world_size: int) -> Check:
    """Is the time between Slurm's signal and the end of the job enough to save?"""
    lead = config.checkpoint.signal_lead_seconds
    parent = existing(Path(config.run.dir))
    rate = _write_rate(parent)
    seconds = checkpoint_bytes(config) / rate  # as if the file system gave all ranks together what it gives one
    finding = f"{lead:.0f} s; a checkpoint takes about {seconds:.1f} s at the {rate / 2**20:.0f} MiB/s of {parent}"
    if lead < 2 * seconds:
        fix = f"set checkpoint.signal_lead_seconds={2 * seconds + 60:.0f} and submit with --signal=USR1@ the same"
        return Check("signal lead", "warn", finding, fix)
    return Check("signal lead", "pass", finding)


def existing(path: Path, key: str = "run.dir") -> Path:
    """The nearest directory above that exists.

    Raises:
        UserError: something that is no directory stands there.
    """
    path = path.absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise UserError("a file is in the way", str(nearest), f"set {key} to another")
    return nearest


def _write_rate(directory: Path) -> float:
    """Bytes per second to disk."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            return _PROBE_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", str(directory), "set run.dir to another") from error
