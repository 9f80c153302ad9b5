"""Where do compilers keep what they have made?"""

import getpass
import os
import tempfile
from pathlib import Path

from pipeline.config import ExperimentConfig
from pipeline.plan.check import Check
from pipeline.plan.check_directory import existing

_ELSEWHERE = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb",
    "ceph",
    "gluster",
    "panfs",
    "weka",
    "afs",
    "9p",
    "orangefs",
)
"""Beginnings of the names of file systems that other nodes see too; those of FUSE follow a dot."""


def check_caches(config: ExperimentConfig) -> Check:
    """Are the compilers' caches on a disk of this node? Ranks of many nodes that share one over a network read files
    that others are still writing, and wait for its locks."""
    places = {}
    if config.engine.compile:
        default = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
        places["TORCHINDUCTOR_CACHE_DIR"] = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    if config.uses_triton():
        places["TRITON_CACHE_DIR"] = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    if not places:
        return Check("caches", "pass", "nothing is compiled")
    kinds = {variable: file_system(existing(place, variable)) for variable, place in places.items()}
    finding = ", ".join(f"{place} ({kinds[variable]})" for variable, place in places.items())
    if remote := [variable for variable, kind in kinds.items() if is_shared(kind)]:
        fix = f"set {' and '.join(remote)} to a disk of the node, as slurm/common.sh does"
        return Check("caches", "warn", f"{finding}: on a network", fix)
    return Check("caches", "pass", finding)


def _user() -> str:
    """As torch names this user, whom the system may not know (a container that was given a number)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid_{os.getuid()}"


def is_shared(kind: str) -> bool:
    """Whether a file system of this kind is usually one of several nodes."""
    return kind.removeprefix("fuse.").startswith(_ELSEWHERE)


def file_system(directory: Path) -> str:
    """The kind of the file system that a directory is on, as the kernel calls it."""
    import psutil

    path = directory.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(Path(m.mountpoint).parts)).fstype if mounts else "unknown"
