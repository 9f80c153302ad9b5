"""How Prometheus finds a run: one `file_sd` file per node, kept fresh while the node serves and swept if it dies."""

import json
import os
import re
import time
from hashlib import sha256
from pathlib import Path

from pipeline.files import put_in_place

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 3600.0
"""An entry that nobody touched for so long belongs to a node that died; until then its silence raises an alert."""


class TargetFile:
    """The entry of one node of one run in a directory that Prometheus watches.

    Args:
        directory: `metrics.targets_dir`; made if missing.
        run_dir: of the run; see `run_label`.
        node: name of the node; with the run it identifies the series over restarts.
    """

    def __init__(self, directory: Path, run_dir: Path, node: str):
        run = run_dir.resolve()
        self.path = directory / f"poa-{_plain(run.name)[:80]}-{_digest(run)}-{_plain(node)[:80]}.json"
        self.labels = {"job": "poa", "run": run_label(run_dir), "node": node, "instance": node}

    def write(self, address: str) -> None:
        """Announce `address` (host:port). Prometheus never sees half a file.

        Raises:
            OSError: the directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with put_in_place(self.path) as aside:  # hidden and without .json: no glob takes it
            entry = json.dumps([{"targets": [address], "labels": self.labels}], indent=1)
            aside.write_text(entry + "\n", encoding="utf-8")

    def touch(self, address: str) -> None:
        """Say that this node is still there; an entry that was swept while the node slept is written again.

        Raises:
            OSError: the directory cannot be written.
        """
        try:
            os.utime(self.path)
        except FileNotFoundError:
            self.write(address)

    def remove(self, address: str) -> None:
        """Withdraw the entry, unless a later start of the run has put its own in its place."""
        try:
            entry = json.loads(self.path.read_text(encoding="utf-8"))
            if entry[0]["targets"] == [address]:
                self.path.unlink()
        except (OSError, ValueError, LookupError):
            return


def run_label(run_dir: Path) -> str:
    """The label `run`: the last two parts of the path for people, and a digest of all of it, since sweeps and users
    give the same names. Letters, digits, `_.-/` and blanks only, so that it can stand in an expression."""
    run = run_dir.resolve()
    name = "/".join(part for part in (run.parent.name, run.name) if part)
    return f"{re.sub(r'[^A-Za-z0-9_./ -]', '_', name)[-120:]}-{_digest(run)[:6]}"


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


def _digest(run: Path) -> str:
    return sha256(os.fsencode(run)).hexdigest()[:8]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)
