"""Checkpoints written and resumed from: atomic, checksummed, retained by count.

They depend on neither the number of ranks nor the ZeRO stage; `saved` has their format.

A checkpoint is written while training goes on, in two parts, each by a thread of its own on every rank: first the
rank's shard, then, on rank 0 alone, what gives it its name. No thread communicates. Each rank counts the parts that it
has finished, the step's own all-reduce adds them up, and only when all ranks know that all have finished do they meet,
between two steps, to begin the next part.
"""

import copy
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import FlatGroup
from pipeline.engine.saved import (
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
from pipeline.engine.snapshot import Snapshot, Taken
from pipeline.errors import UserError
from pipeline.files import ASIDE, save_tensors, sha256, sync, write_atomically
from pipeline.method.losses import Centering

_LEFTOVER = re.compile(r"\.step_\d{8}\.(tmp|old\d*)")
# files of a checkpoint, and what a write that was cut short leaves: safetensors writes to .tmpXXXXXX first
_OWN = re.compile(rf"shard_\d+\.safetensors|manifest\.json|\.manifest\.json\.tmp|{ASIDE.pattern}|\.tmp\w{{6}}")


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


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched.

    Attributes:
        step: of the checkpoint.
    """

    def __init__(self, step: int, error: OSError):
        super().__init__(str(error))
        self.step = step


class Written(NamedTuple):
    """A checkpoint that has its name: of which step, where, and how long it took since its snapshot."""

    step: int
    path: Path
    seconds: float


@dataclass
class _Writing:
    """The checkpoint under way: its snapshot's manifest, and the part that this rank is at."""

    step: int
    aside: Path
    final: Path
    manifest: dict[str, Any]
    began: float
    part: Future[Any]
    has_shards: bool = False


class Checkpoints:
    """The `checkpoints` directory of a run.

    Args:
        root: the directory.
        keep: how many checkpoints stay.
        ranks: this process and its peers; every method is collective over them.
        fence: raises on rank 0 if another process has taken over the run.
        tell: called on rank 0, from another thread, with the step of a checkpoint that is complete.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        ranks: Ranks,
        fence: Callable[[], None] = lambda: None,
        tell: Callable[[int], None] = lambda step: None,
    ):
        self.root, self.keep, self.ranks, self.fence, self.tell = root, keep, ranks, fence, tell
        self._snapshot = Snapshot(ranks)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None
        self._parts_begun = 0

    def begin(self, engine: Engine, centering: Centering, progress: Progress) -> None:
        """Copy the state of all that a checkpoint holds, and begin to write it beside what comes next.

        Args:
            engine: of the weights.
            centering: of the teacher's targets.
            progress: of the run.

        Raises:
            SaveError: on every rank.
        """
        assert self._writing is None, "one checkpoint is written at a time"
        final = self.root / _name(progress.step)
        aside = self.root / f".{final.name}.tmp"
        with self._save_error(progress.step, aside):
            self.ranks.agree(lambda: self._make_room(aside))
        began = time.perf_counter()
        taken = self._snapshot.take(engine, centering)
        manifest = {
            "format": FORMAT,
            **copy.deepcopy(vars(progress)),
            "world_size": self.ranks.world_size,
            "optimizer_steps": engine.optimizer_steps(),
            "groups": [_describe(group) for group in engine.groups],
        }
        part = self._begin_part(lambda: self._write_shard(aside, taken))
        self._writing = _Writing(progress.step, aside, final, manifest, began, part)

    @property
    def step(self) -> int | None:
        """Of the checkpoint under way."""
        return self._writing.step if self._writing else None

    @property
    def parts_finished(self) -> int:
        """Parts of checkpoints that this rank has finished since it started, well or not."""
        return self._parts_begun - bool(self._writing and not self._writing.part.done())

    def can_move_on(self, parts_finished: int) -> bool:
        """Whether all ranks have finished the part that they are at.

        Args:
            parts_finished: the sum over all ranks, as all of them know it.
        """
        return self._writing is not None and parts_finished >= self._parts_begun * self.ranks.world_size

    def move_on(self, retire: bool = True) -> Written | None:
        """Wait for the part under way and begin the next one; what is complete if there is none.

        Args:
            retire: once it is complete, remove all but the newest `keep`; one that cannot be removed is tried again the
                next time.

        Raises:
            SaveError: on every rank if any of them could not write.
        """
        writing = self._writing
        assert writing is not None
        with self._save_error(writing.step, writing.aside):
            if not writing.has_shards:
                files = self.ranks.together(writing.part.result)
                entries = {name: entry for part in files for name, entry in part.items()}
                writing.part = self._begin_part(lambda: self._complete(writing, entries, retire))
                writing.has_shards = True
                return None
            self.ranks.together(writing.part.result)
        self._writing = None
        return Written(writing.step, writing.final, time.perf_counter() - writing.began)

    def finish(self, retire: bool = True) -> Written | None:
        """Wait for the checkpoint under way, if there is one; see `move_on`.

        Raises:
            SaveError: on every rank if any of them could not write.
        """
        written = None
        while self._writing is not None:
            written = self.move_on(retire)
        return written

    def close(self) -> None:
        """Let the part under way end; what it wrote has no name and is removed at the next start."""
        self._thread.shutdown()

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
            steps = ", ".join(str(int(name[-8:])) for name in reversed(names))
            there = f"there is one of step {steps}" if steps else "there is none at all"
            raise UserError(f"no checkpoint of step {step}", str(self.root), there)
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

    def _begin_part(self, work: Callable[[], Any]) -> Future[Any]:
        self._parts_begun += 1
        return self._thread.submit(work)

    @contextmanager
    def _save_error(self, step: int, aside: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writing = None
            if self.ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise SaveError(step, error) from error

    def _write_shard(self, aside: Path, taken: Taken) -> dict[str, dict[str, Any]]:
        name = f"shard_{self.ranks.rank:05d}.safetensors"
        taken.wait()
        save_tensors(taken.tensors, aside / name)
        return {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)}}

    def _complete(self, writing: _Writing, files: dict[str, Any], retire: bool) -> None:
        """Rank 0's second part; the others have none."""
        if not self.ranks.is_main:
            return
        self._publish(writing.aside, writing.final, writing.manifest | {"files": files})
        self.tell(writing.step)
        if retire:
            self._retire()

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
    """Remove a checkpoint's directory, or of one that holds other things too (notes, say) what is the checkpoint's.

    If that fails it stays for the next time, for others may still be reading its files. Of a link the link goes.
    """
    try:
        if path.is_symlink():
            path.unlink()
            return
        names = os.listdir(path)
        own = [name for name in names if _OWN.fullmatch(name)]
        if len(own) == len(names):
            shutil.rmtree(path)
            return
        for name in own:
            (path / name).unlink()
        if own:
            print(f"warning: kept {path}: it holds files that are not of the checkpoint", file=sys.stderr)
    except FileNotFoundError:
        pass
    except OSError as error:
        _still_there(path, error)


def _still_there(path: Path, error: OSError) -> None:
    print(f"warning: cannot remove {path}: {error.strerror}; trying again at the next save", file=sys.stderr)


def _describe(group: FlatGroup) -> dict[str, Any]:
    spec = group.spec
    return {"names": spec.names, "shapes": spec.shapes, "offsets": spec.offsets, "numel": spec.numel}


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
