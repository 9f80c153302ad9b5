"""What a run has saved: checkpoints found, checked and read, with or without a training engine.

A checkpoint is a directory `step_00001000` with one `shard_RRRRR.safetensors` per rank and a `manifest.json`, written
last. A shard holds, for every parameter group g, the rank's pieces of the flat fp32 vectors `g.master`, `g.ema`,
`g.exp_avg` and `g.exp_avg_sq`, one after the other, and in `g.pieces` (int64 `[P, 2]`) where each begins in the vector
and how long it is; shard 0 also holds the centers. The manifest names the parameters in each vector, so any number of
ranks at any ZeRO stage can read it, and `load_weights` needs no training engine at all.

What cannot be looked at is not taken for absent or damaged: every error of the file system but a plain absence is a
`UserError` here.
"""

import json
import os
import re
import stat
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.engine.groups import GroupSpec, Piece
from pipeline.errors import UserError
from pipeline.files import sha256

FORMAT = 2
VECTORS = ("master", "ema", "exp_avg", "exp_avg_sq")
BRANCHES = {"teacher": "ema", "student": "master"}
CENTER = "center."
COUNTS = ("step", "samples", "bad_steps", "bad_in_a_row", "skipped_samples")
"""Of the run, in a manifest."""

_NAME = re.compile(r"step_\d{8}")
_ENTRIES = ("format", *COUNTS, "world_size", "optimizer_steps", "groups", "files")


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints: the one that `latest` names, those before it from new to old, then any of later steps.

    Later ones are left from before the run went back to an earlier state, as it does when the newest are damaged.

    Raises:
        UserError: the directory cannot be looked at.
    """
    try:
        found = [root / name for name in os.listdir(root) if _NAME.fullmatch(name) and _is_directory(root / name)]
        latest = _read_latest(root)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(root):
            return []
        raise unreadable(root, error) from error
    newest = latest if _NAME.fullmatch(latest) else max((path.name for path in found), default="")
    return sorted(found, key=lambda path: (path.name <= newest, path.name), reverse=True)


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():  # to what is not there now
            raise
        return False  # removed since it was listed


def _read_latest(root: Path) -> str:
    try:
        return (root / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""  # as long as the first checkpoint is being written


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def find_problem(path: Path, part: int = 0, parts: int = 1, checksums: bool = True) -> str | None:
    """Compare a checkpoint with its manifest: what was read and is wrong, or None.

    Args:
        path: a checkpoint that `list_checkpoints` found.
        part: compare the checksums of every `parts`-th file only, from this one on.
        parts: see `part`.
        checksums: compare them; without, files are only looked at.

    Raises:
        UserError: it cannot be read, so that nothing is known of it.
    """
    try:
        path.stat()  # or it was found on another node, and is not there on this one
        return _first_problem(path, part, parts, checksums)
    except OSError as error:
        raise unreadable(path, error) from error


def _first_problem(path: Path, part: int, parts: int, checksums: bool) -> str | None:
    try:
        manifest = read_manifest(path)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, expected {FORMAT}"
        if missing := [name for name in _ENTRIES if name not in manifest]:
            return f"manifest.json has no {missing[0]}"
        for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
            with open(path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, expected {entry['bytes']}"
            if checksums and index % parts == part and sha256(path / name) != entry["sha256"]:
                return f"{name} has another checksum than the manifest"
    except FileNotFoundError as error:
        if os.path.lexists(error.filename):  # a link to what is not there now
            raise
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say of a place that cannot be looked at."""
    return UserError(
        f"cannot read the checkpoints: {error.strerror or error}",
        str(error.filename or path),
        "see to its rights and to the file system it is on; nothing was changed",
    )


def damaged(path: Path, problem: str) -> None:
    """Say that a checkpoint is passed over."""
    print(f"warning: checkpoint {path} is damaged: {problem}; trying the one before", file=sys.stderr)


def load_weights(root: Path, branch: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Full fp32 weights of the newest intact checkpoint, without an engine.

    Args:
        root: a `checkpoints` directory.
        branch: "teacher" (the EMA) or "student".

    Returns:
        Parameter name -> fp32 tensor, and the manifest.

    Raises:
        UserError: there is no intact checkpoint, or one cannot be read.
    """
    path, manifest = intact_checkpoint(root)
    return load_named(path, manifest, BRANCHES[branch]), manifest


def intact_checkpoint(root: Path) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint and its manifest, without an engine.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    saved = list_checkpoints(root)
    for path in saved:
        problem = find_problem(path)
        if problem is None:
            return path, read_manifest(path)
        damaged(path, problem)
    if saved:
        raise UserError("no intact checkpoint", str(root), "restore one, or name another run")
    raise UserError("no intact checkpoint", str(root), "train first, or name another run")


def load_named(path: Path, manifest: dict[str, Any], vector: str) -> dict[str, Tensor]:
    """What a checkpoint holds of an entry of `VECTORS`, in fp32 by parameter name."""
    weights: dict[str, Tensor] = {}
    wholes = [[Source(index, Piece(0, 0, group["numel"]))] for index, group in enumerate(manifest["groups"])]
    lengths = [group["numel"] for group in manifest["groups"]]
    vectors = read_vectors(path, manifest, wholes, lengths, vector)
    for flat, group in zip(vectors, manifest["groups"], strict=True):
        for name, shape, offset in zip(group["names"], group["shapes"], group["offsets"], strict=True):
            weights[name] = flat[vector][offset : offset + torch.Size(shape).numel()].view(shape)
    return weights


def load_centers(path: Path) -> dict[str, Tensor]:
    """The centers of a checkpoint, as `cls.HEAD` and `patch.HEAD`."""
    with safe_open(path / "shard_00000.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(CENTER)]  # noqa: SIM118  (it is no mapping)
        return {name.removeprefix(CENTER): file.get_tensor(name) for name in names}


class Source(NamedTuple):
    """A piece of a vector that begins at `piece.start` in the saved vector of `group`."""

    group: int
    piece: Piece


def find_sources(saved: Sequence[dict[str, Any]], spec: GroupSpec, pieces: Sequence[Piece]) -> list[Source]:
    """Where the elements of pieces of a parameter group lie in vectors that may be grouped in another way.

    Args:
        saved: the groups of a manifest; they hold every parameter of `spec`.
        spec: of the group.
        pieces: of its vector.
    """
    places = {
        name: (index, offset)
        for index, group in enumerate(saved)
        for name, offset in zip(group["names"], group["offsets"], strict=True)
    }
    out: list[Source] = []
    for piece in pieces:
        for name, offset, size in zip(spec.names, spec.offsets, spec.sizes, strict=True):
            low, high = max(piece.start, offset), min(piece.start + piece.length, offset + size)
            if low < high:
                index, begin = places[name]
                found = Source(index, Piece(piece.local + low - piece.start, begin + low - offset, high - low))
                joined = _joined(out[-1], found) if out else None
                out[-1:] = [joined] if joined else [*out[-1:], found]
    return out


def _joined(first: Source, second: Source) -> Source | None:
    """Two pieces as one if the second follows the first at both ends."""
    (group, (local, start, length)), (other, (then, there, more)) = first, second
    follows = group == other and local + length == then and start + length == there
    return Source(group, Piece(local, start, length + more)) if follows else None


def read_vectors(
    path: Path, manifest: dict[str, Any], wanted: Sequence[Sequence[Source]], lengths: Sequence[int], *keys: str
) -> list[dict[str, Tensor]]:
    """Vectors by key with the wanted pieces filled in, and zeros where no piece is (padding).

    Args:
        path: a checkpoint.
        manifest: of it.
        wanted: per vector, where its pieces come from.
        lengths: of the vectors.
        keys: entries of `VECTORS`.

    Raises:
        ValueError: the shards do not hold every element that is wanted.
    """
    out = [{key: torch.zeros(length) for key in keys} for length in lengths]
    missing = sum(source.piece.length for sources in wanted for source in sources)
    for rank in range(manifest["world_size"]):
        with safe_open(path / f"shard_{rank:05d}.safetensors", framework="pt") as file:
            saved = [_SavedPieces.of(file.get_tensor(f"{i}.pieces")) for i in range(len(manifest["groups"]))]
            for vectors, sources in zip(out, wanted, strict=True):
                for source, piece in sources:
                    for here, there in _overlaps(piece, saved[source]):
                        missing -= here.stop - here.start
                        for key in keys:
                            vectors[key][here] = file.get_slice(f"{source}.{key}")[there]
    if missing:
        raise ValueError(f"{path}: {missing} elements are in none of the shards")
    return out


class _SavedPieces(NamedTuple):
    """Pieces of a saved shard: where each begins in the whole vector, rising, its length, its end in the shard."""

    begins: list[int]
    lengths: list[int]
    ends: list[int]

    @classmethod
    def of(cls, pieces: Tensor) -> "_SavedPieces":
        begins, lengths = pieces.unbind(1)
        return cls(begins.tolist(), lengths.tolist(), lengths.cumsum(0).tolist())


def _overlaps(piece: Piece, saved: _SavedPieces) -> Iterator[tuple[slice, slice]]:
    """Places in a vector with the places of the same elements in a saved one."""
    stop = piece.start + piece.length
    for i in range(max(bisect_right(saved.begins, piece.start) - 1, 0), len(saved.begins)):
        start, length = saved.begins[i], saved.lengths[i]
        low, high = max(piece.start, start), min(stop, start + length)
        if start >= stop:
            break
        if low < high:
            here, there = piece.local - piece.start, saved.ends[i] - length - start
            yield slice(low + here, high + here), slice(low + there, high + there)
