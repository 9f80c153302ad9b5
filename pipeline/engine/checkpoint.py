"""Checkpoints written and resumed from: atomic, checksummed, retained by count.

They depend on neither the number of ranks nor the ZeRO stage; `saved` has their format.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import FlatGroup, Piece
from pipeline.engine.saved import (
    CENTER,
    COUNTS,
    FORMAT,
    VECTORS,
    damaged,
    find_problem,
    find_sources,
    list_checkpoints,
    load_centers,
    read_manifest,
    read_vectors,
)
from pipeline.errors import UserError
from pipeline.files import save_tensors, sha256, sync, write_atomically
from pipeline.method.losses import Centering

_LEFTOVER = re.compile(r"\.step_\d{8}\.(tmp|old\d*)")


@dataclass
class Progress:
    """What a run counts; saved with every checkpoint.

    Attributes:
        step: completed steps, bad ones included.
        samples: samples consumed over all ranks, the position in the data stream.
        bad_steps: skipped updates by the term that was not finite.
        bad_in_a_row: skipped updates since the last good one.
        skipped_samples: by reason.
    """

    step: int
    samples: int
    bad_steps: dict[str, int]
    bad_in_a_row: int
    skipped_samples: dict[str, int]


@dataclass(frozen=True)
class Saved:
    """An intact checkpoint: where it lies, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """Where a run goes on from it; bad steps in a row are counted anew."""
        return Progress(**{**{key: self.manifest[key] for key in COUNTS}, "bad_in_a_row": 0})


class Checkpoints:
    """The `checkpoints` directory of a run.

    Args:
        root: the directory.
        keep: how many checkpoints stay.
        ranks: this process and its peers; every method is collective over them.
        fence: raises on rank 0 if another process has taken over the run.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks, fence: Callable[[], None] = lambda: None):
        self.root, self.keep, self.ranks, self.fence = root, keep, ranks, fence

    def save(self, engine: Engine, centering: Centering, progress: Progress, retire: bool = True) -> Path:
        """Write a checkpoint; it appears under its name only when complete and on disk.

        Args:
            engine: of the weights.
            centering: of the teacher's targets.
            progress: of the run.
            retire: then remove all but the newest `keep`; one that cannot be removed is tried again the next time.

        Raises:
            OSError: on every rank if any rank could not write; earlier checkpoints are untouched.
        """
        final = self.root / _name(progress.step)
        aside = self.root / f".{final.name}.tmp"
        self.ranks.agree(lambda: self._make_room(aside))
        try:
            files = self.ranks.together(lambda: self._write_shard(aside, engine, centering))
            manifest = {
                "format": FORMAT,
                **vars(progress),
                "world_size": self.ranks.world_size,
                "optimizer_steps": engine.optimizer_steps(),
                "groups": [_describe(group) for group in engine.groups],
                "files": {name: entry for part in files for name, entry in part.items()},
            }
            self.ranks.agree(lambda: self._publish(aside, final, manifest))
        except OSError:
            if self.ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if retire:
            self.ranks.agree(self._retire)
        return final

    def find(self, step: int | None = None) -> Saved | None:
        """The newest intact checkpoint, falling back with a loud message if one is damaged; None if there is none.

        Args:
            step: consider that of this step alone.

        Raises:
            UserError: there are checkpoints but none is intact, one cannot be read, or there is none of `step`.
        """
        candidates = self.ranks.agree(lambda: self._candidates(step))
        for name in candidates:
            path = self.root / name
            problem = self._first_problem(path)
            if problem is None:
                return Saved(path, read_manifest(path))
            if self.ranks.is_main:
                damaged(path, problem)
        if candidates:
            raise UserError(
                "none of the checkpoints is intact", str(self.root), "restore one, or train in another run directory"
            )
        return None

    def _candidates(self, step: int | None) -> list[str]:
        names = [path.name for path in list_checkpoints(self.root)]
        if step is None:
            return names
        if _name(step) not in names:
            steps = ", ".join(str(int(name[-8:])) for name in reversed(names)) or "none"
            raise UserError(f"no checkpoint of step {step}", str(self.root), f"there is one of step {steps}")
        return [_name(step)]

    def load(self, saved: Saved, engine: Engine, centering: Centering) -> None:
        """Bring engine and centers to the state of a checkpoint.

        Raises:
            UserError: it is of another model.
        """
        self.ranks.together(lambda: _restore(engine, centering, saved.path, saved.manifest))
        engine.refresh()

    def _make_room(self, aside: Path) -> None:
        self.fence()
        self.root.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(self.root):
            if _LEFTOVER.fullmatch(name):
                _remove(self.root / name)
        aside.mkdir(exist_ok=True)

    def _write_shard(self, aside: Path, engine: Engine, centering: Centering) -> dict[str, dict[str, Any]]:
        name = f"shard_{self.ranks.rank:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for index, group in enumerate(engine.groups):
            pieces = _own_pieces(group, engine.replicated, self.ranks)
            places = torch.tensor([(p.start, p.length) for p in pieces], dtype=torch.int64).reshape(-1, 2)
            tensors[f"{index}.pieces"] = places
            vectors = {"master": group.master, "ema": group.ema, **engine.moments(group)}
            for key, vector in vectors.items():
                tensors[f"{index}.{key}"] = _joined([vector.detach()[p.here] for p in pieces])
        if self.ranks.is_main:
            tensors |= {
                f"{CENTER}{kind}.{h}": center.cpu()
                for kind, heads in centering.center.items()
                for h, center in enumerate(heads)
            }
        save_tensors(tensors, aside / name)
        return {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)}}

    def _publish(self, aside: Path, final: Path, manifest: dict[str, Any]) -> None:
        write_atomically(aside / "manifest.json", json.dumps(manifest, indent=1))
        self.fence()
        damaged_one = _set_aside(final) if final.exists() else None  # it was passed over when the run resumed
        # `latest` first: a crash in between leaves it naming nothing, never naming an older checkpoint than there is
        write_atomically(self.root / "latest", final.name + "\n")
        os.rename(aside, final)
        sync(self.root)
        if damaged_one:
            _remove(damaged_one)

    def _retire(self) -> None:
        try:
            retired = list_checkpoints(self.root)[self.keep :]
        except UserError as error:
            print(f"warning: no old checkpoint is removed: {error}", file=sys.stderr)
            return
        for path in retired:
            try:
                aside = _set_aside(path)
            except OSError as error:
                _still_there(path, error)
            else:
                _remove(aside)

    def _first_problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; its files are shared out over the ranks for checking."""
        problems = self.ranks.together(lambda: find_problem(path, self.ranks.rank, self.ranks.world_size))
        return next((p for p in problems if p), None)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to be removed, so that what is half removed bears no checkpoint's name."""
    names = (path.with_name(f".{path.name}.old{number or ''}") for number in count())
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    return aside


def _remove(path: Path) -> None:
    """Remove a directory; if that fails it stays for the next time, for others may still be reading its files."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _still_there(path, error)


def _still_there(path: Path, error: OSError) -> None:
    print(f"warning: cannot remove {path}: {error.strerror}; trying again at the next save", file=sys.stderr)


def _describe(group: FlatGroup) -> dict[str, Any]:
    spec = group.spec
    return {"names": spec.names, "shapes": spec.shapes, "offsets": spec.offsets, "numel": spec.numel}


def _own_pieces(group: FlatGroup, replicated: bool, ranks: Ranks) -> Sequence[Piece]:
    """What this rank saves: all of a shard, an equal share of a replica."""
    if not replicated:
        return group.pieces
    share = -(-group.spec.numel // ranks.world_size)
    start = ranks.rank * share
    length = min(share, group.spec.numel - start)
    return [Piece(start, start, length)] if length > 0 else []


def _joined(parts: list[Tensor]) -> Tensor:
    """One contiguous vector on the CPU; a device never holds a second copy of it."""
    parts = [part.cpu() for part in parts]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts or [torch.empty(0)])


def _require_fit(groups: Sequence[FlatGroup], saved: Sequence[dict[str, Any]], path: Path) -> None:
    """Parameters may be grouped in another way, but have to be the same ones.

    Raises:
        UserError: one is missing on either side, or has another shape; it is named.
    """
    ours = {name: list(shape) for g in groups for name, shape in zip(g.spec.names, g.spec.shapes, strict=True)}
    theirs = {name: shape for g in saved for name, shape in zip(g["names"], g["shapes"], strict=True)}
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        there, here = (sizes.get(wrong[0], "absent") for sizes in (theirs, ours))
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise UserError(
            f"the checkpoint is of another model: {wrong[0]} is {there} there and {here} here{more}",
            str(path),
            "give model.* and heads.* the sizes of that run, or use another run directory",
        )


def _restore(engine: Engine, centering: Centering, path: Path, manifest: dict[str, Any]) -> None:
    _require_fit(engine.groups, manifest["groups"], path)
    wanted = [find_sources(manifest["groups"], group.spec, group.pieces) for group in engine.groups]
    shards = read_vectors(path, manifest, wanted, [len(group.master) for group in engine.groups], *VECTORS)
    for index, shard in enumerate(shards):
        engine.restore(index, shard, manifest["optimizer_steps"])
    centers = load_centers(path)
    for kind, heads in centering.center.items():
        for h, center in enumerate(heads):
            center.copy_(centers[f"{kind}.{h}"])
