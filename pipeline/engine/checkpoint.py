"""Checkpoints: atomic, checksummed, retained by count, independent of the number of ranks and the ZeRO stage.

A checkpoint is a directory `step_00001000` with one `shard_RRRRR.safetensors` per rank and a `manifest.json`, written
last. A shard holds, for every parameter group g, the rank's pieces of the flat fp32 vectors `g.master`, `g.ema`,
`g.exp_avg` and `g.exp_avg_sq`, one after the other, and in `g.pieces` (int64 `[P, 2]`) where each begins in the vector
and how long it is; shard 0 also holds the centers. The manifest names the parameters in each vector, so any number of
ranks at any ZeRO stage can read it, and `load_weights` needs no training engine at all.
"""

import json
import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import FlatGroup, Piece
from pipeline.errors import UserError
from pipeline.files import save_tensors, sha256, sync, write_atomically
from pipeline.method.losses import Centering

FORMAT = 2
VECTORS = ("master", "ema", "exp_avg", "exp_avg_sq")
BRANCHES = {"teacher": "ema", "student": "master"}


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

    def save(self, engine: Engine, centering: Centering, progress: Progress) -> Path:
        """Write a checkpoint; it appears under its name only when complete and on disk.

        Raises:
            OSError: on every rank if any rank could not write; earlier checkpoints are untouched.
        """
        final = self.root / f"step_{progress.step:08d}"
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
        return final

    def resume(self, engine: Engine, centering: Centering) -> Progress | None:
        """Load the newest intact checkpoint, falling back with a loud message if one is damaged.

        Returns:
            Its progress, or None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints but none is intact, or they are of another model.
        """
        candidates = self.ranks.agree(lambda: [c.name for c in list_checkpoints(self.root)])
        for name in candidates:
            path = self.root / name
            problem = self._first_problem(path)
            if problem is None:
                manifest = read_manifest(path)
                self.ranks.together(lambda p=path, m=manifest: _restore(engine, centering, p, m))  # type: ignore[misc]
                engine.refresh()
                return Progress(**{key: manifest[key] for key in Progress.__dataclass_fields__})
            if self.ranks.is_main:
                print(f"warning: checkpoint {path} is damaged: {problem}; trying the one before", file=sys.stderr)
        if candidates:
            raise UserError(
                "none of the checkpoints is intact", str(self.root), "restore one, or remove them to start anew"
            )
        return None

    def _make_room(self, aside: Path) -> None:
        self.fence()
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        aside.mkdir()

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
                f"center.{kind}.{h}": center.cpu()
                for kind, heads in centering.center.items()
                for h, center in enumerate(heads)
            }
        save_tensors(tensors, aside / name)
        return {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)}}

    def _publish(self, aside: Path, final: Path, manifest: dict[str, Any]) -> None:
        write_atomically(aside / "manifest.json", json.dumps(manifest, indent=1))
        self.fence()
        if final.exists():  # a damaged one, passed over when the run resumed
            shutil.rmtree(final)
        # `latest` first: a crash in between leaves it naming nothing, never naming an older checkpoint than there is
        write_atomically(self.root / "latest", final.name + "\n")
        os.rename(aside, final)
        sync(self.root)
        for old in list_checkpoints(self.root)[self.keep :]:
            shutil.rmtree(old)

    def _first_problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; its files are shared out over the ranks for checking."""
        problems = self.ranks.gather(find_problem(path, self.ranks.rank, self.ranks.world_size))
        return next((p for p in problems if p), None)


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, the one `latest` names first, then from new to old."""
    if not root.is_dir():
        return []
    found = sorted((p for p in root.glob("step_*") if p.is_dir()), reverse=True)
    try:
        latest = root / (root / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return found
    return sorted(found, key=lambda path: path != latest)  # stable: the others stay from new to old


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def find_problem(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Compare a checkpoint with its manifest; the checksums of every `parts`-th file only."""
    try:
        manifest = read_manifest(path)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, expected {FORMAT}"
        for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, expected {entry['bytes']}"
            if index % parts == part and sha256(path / name) != entry["sha256"]:
                return f"{name} has another checksum than the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_weights(root: Path, branch: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Full fp32 weights of the newest intact checkpoint, without an engine.

    Args:
        root: a `checkpoints` directory.
        branch: "teacher" (the EMA) or "student".

    Returns:
        Parameter name -> fp32 tensor, and the manifest.

    Raises:
        UserError: there is no intact checkpoint.
    """
    for path in list_checkpoints(root):
        problem = find_problem(path)
        if problem is None:
            manifest = read_manifest(path)
            weights: dict[str, Tensor] = {}
            wholes = [[Piece(0, 0, group["numel"])] for group in manifest["groups"]]
            vectors = _read(path, manifest, wholes, [group["numel"] for group in manifest["groups"]], BRANCHES[branch])
            for flat, group in zip(vectors, manifest["groups"], strict=True):
                for name, shape, offset in zip(group["names"], group["shapes"], group["offsets"], strict=True):
                    weights[name] = flat[BRANCHES[branch]][offset : offset + torch.Size(shape).numel()].view(shape)
            return weights, manifest
        print(f"warning: checkpoint {path} is damaged: {problem}; trying the one before", file=sys.stderr)
    raise UserError("no intact checkpoint", str(root), "train first, or name another run")


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


def _read(
    path: Path, manifest: dict[str, Any], wanted: Sequence[Sequence[Piece]], lengths: Sequence[int], *keys: str
) -> list[dict[str, Tensor]]:
    """Per group, vectors by key with the wanted pieces filled in, and zeros where no piece is (padding).

    Raises:
        ValueError: the shards do not hold every element that is wanted.
    """
    out = [{key: torch.zeros(length) for key in keys} for length in lengths]
    missing = sum(piece.length for pieces in wanted for piece in pieces)
    for rank in range(manifest["world_size"]):
        with safe_open(path / f"shard_{rank:05d}.safetensors", framework="pt") as file:
            for index, pieces in enumerate(wanted):
                for here, there in _overlaps(pieces, file.get_tensor(f"{index}.pieces").tolist()):
                    missing -= here.stop - here.start
                    for key in keys:
                        out[index][key][here] = file.get_slice(f"{index}.{key}")[there]
    if missing:
        raise ValueError(f"{path}: {missing} elements are in none of the shards")
    return out


def _overlaps(wanted: Sequence[Piece], saved: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Places in a shard with the places of the same elements in a saved one; both list their pieces in rising order."""
    ends = list(accumulate(length for _, length in saved))
    begins = [start for start, _ in saved]
    for piece in wanted:
        stop = piece.start + piece.length
        for i in range(max(bisect_right(begins, piece.start) - 1, 0), len(saved)):
            start, length = saved[i]
            low, high = max(piece.start, start), min(stop, start + length)
            if start >= stop:
                break
            if low < high:
                here, there = piece.local - piece.start, ends[i] - length - start
                yield slice(low + here, high + here), slice(low + there, high + there)


def _restore(engine: Engine, centering: Centering, path: Path, manifest: dict[str, Any]) -> None:
    ours = json.loads(json.dumps([_describe(group) for group in engine.groups]))
    if ours != manifest["groups"]:
        raise UserError("the checkpoint is of another model or optimizer", str(path), "use another run directory")
    wanted = [group.pieces for group in engine.groups]
    shards = _read(path, manifest, wanted, [len(group.master) for group in engine.groups], *VECTORS)
    for index, shard in enumerate(shards):
        engine.restore(index, shard, manifest["optimizer_steps"])
    with safe_open(path / "shard_00000.safetensors", framework="pt") as file:
        for kind, heads in centering.center.items():
            for h, center in enumerate(heads):
                center.copy_(file.get_tensor(f"center.{kind}.{h}"))
