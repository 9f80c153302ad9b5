"""How Prometheus finds a run: one `file_sd` file per node, kept fresh while the node serves and swept if it dies."""

import json
import os
import re
import time
from hashlib import sha256
from pathlib import Path

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 3600.0
"""An entry that nobody touched for so long belongs to a node that died; until then its silence raises an alert."""


class TargetFile:
    """The entry of one node of one run in a directory that Prometheus watches.

    Args:
        directory: `metrics.targets_dir`; made if missing.
        run_dir: of the run; its name is the label `run`.
        node: name of the node; with the run it identifies the series over restarts.
    """

    def __init__(self, directory: Path, run_dir: Path, node: str):
        run = run_dir.resolve()
        digest = sha256(str(run).encode()).hexdigest()[:8]  # two runs may bear one name
        self.path = directory / f"poa-{_plain(run.name)}-{digest}-{_plain(node)}.json"
        self.labels = {"job": "poa", "run": run.name, "node": node, "instance": node}

    def write(self, address: str) -> None:
        """Announce `address` (host:port). Prometheus never sees half a file.

        Raises:
            OSError: the directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")  # hidden and without .json: no glob takes it
        aside.write_text(json.dumps([{"targets": [address], "labels": self.labels}], indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)

    def touch(self) -> None:
        """Say that this node is still there."""
        if self.path.exists():
            os.utime(self.path)

    def remove(self, address: str) -> None:
        """Withdraw the entry, unless a later start of the run has put its own in its place."""
        try:
            entry = json.loads(self.path.read_text(encoding="utf-8"))
            if entry[0]["targets"] == [address]:
                self.path.unlink()
        except (OSError, ValueError, LookupError):
            return


def sweep(directory: Path, older_than_seconds: float = STALE_SECONDS) -> list[Path]:
    """Remove entries whose node no longer touches them, of any run; returns what went."""
    limit = time.time() - older_than_seconds
    gone = []
    for path in directory.glob("poa-*.json"):
        try:
            if path.stat().st_mtime < limit:
                path.unlink()
                gone.append(path)
        except OSError:  # another node was faster
            continue
    return gone


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)
