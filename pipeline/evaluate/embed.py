"""Features of shards as files: one per shard of images, with the keys beside it, resumable, spread over ranks."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage
from pipeline.data.intake import MAX_PIXELS
from pipeline.data.keys import keys_of
from pipeline.data.patterns import Shards, list_shards
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.features import BATCH_SIZE, batches, require_finite
from pipeline.evaluate.spread import decoding_threads, device_of, everywhere, on_one
from pipeline.evaluate.targets import Target, directory_target, is_run, run_target
from pipeline.files import (
    ASIDE,
    put_in_place,
    read_json,
    save_tensors,
    sha256,
    sync,
    writable_folder,
    write_atomically,
)
from pipeline.models.loading import RunModels, run_config

MANIFEST = "manifest.json"
KINDS = {"cls": ("cls",), "patch": ("patch_mean",), "both": ("cls", "patch_mean")}
"""Names of the tensors by what is asked for."""
FORMATS = ("safetensors", "npy")


@dataclass(frozen=True)
class Wanted:
    """What `embed` is asked for.

    Attributes:
        path: a run directory, or one that timm can load.
        shards: of images; labels are kept where there are some.
        out: the folder to write to.
        subnet: of a run, the largest if None.
        branch: "teacher" or "student" of a run, the teacher if None.
        kind: key of `KINDS`.
        format: of `FORMATS`.
        progress: show progress bars.
    """

    path: Path
    shards: Shards
    out: Path
    subnet: str | None = None
    branch: str | None = None
    kind: str = "cls"
    format: str = "safetensors"
    progress: bool = False


class _Pictures:
    """Images of one shard, with their labels where they have some."""

    def __init__(self, images: EvalImages):
        self.images, self.dataset = images, images.dataset

    def sample(self, record: int) -> tuple[int | None, Tensor]:
        try:
            label = self.images.label(record)
        except BadImage:
            label = None
        return label, self.images.load(record)


def embed(wanted: Wanted, ranks: Ranks | None = None) -> dict[str, Any]:
    """Write for each shard `part-NNNNNN.safetensors` (or one `.npy` per kind of feature) and `part-NNNNNN.json`, and a
    manifest. A part that is whole is not made again. Collective: the ranks take a shard each and wait for one another,
    so that none waits for longer than a shard takes.

    Returns:
        The manifest.

    Raises:
        UserError: model, shards or folder are not usable, or the folder holds features of something else.
    """
    target, max_pixels = everywhere(ranks, lambda: _target(wanted))
    (candidate,) = target.candidates
    intake = target.intake._replace(max_pixels=max_pixels)
    names = everywhere(ranks, lambda: list_shards(wanted.shards))
    model = everywhere(ranks, candidate.load)
    identity = {
        "model": candidate.name,
        "weights": _digest(model),
        **candidate.origin,
        "features": list(KINDS[wanted.kind]),
        "dtype": "float32",
        "format": wanted.format,
        "preprocessing": json.loads(json.dumps(target.preprocessing)),
        "shards": names,
    }
    on_one(ranks, lambda: _claim(wanted.out, identity))
    device = device_of(ranks)
    threads = decoding_threads(ranks)
    model.to(device).eval()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)

    def make(number: int) -> None:
        if number < len(names) and not _is_whole(wanted.out, number, names[number]):
            images = EvalImages(names[number], target.preprocessing, intake)
            _write(wanted, number, names[number], _features(model, images, wanted, device, threads))

    for first in range(0, len(names), world_size):
        everywhere(ranks, partial(make, first + rank))
    parts = everywhere(ranks, lambda: [_part(wanted.out, number) for number in range(len(names))])
    manifest = identity | {
        "samples": sum(part["samples"] for part in parts),
        "skipped": dict(sum((Counter(part["skipped"]) for part in parts), Counter())),
        "widths": parts[0]["widths"],
        "parts": [{key: part[key] for key in ("shard", "files", "samples")} for part in parts],
    }
    if rank == 0:
        write_atomically(wanted.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _target(wanted: Wanted) -> tuple[Target, int]:
    if is_run(wanted.path):
        config = run_config(wanted.path)
        branch = wanted.branch or "teacher"
        models = RunModels.open(wanted.path, branch)
        return run_target(models, [wanted.subnet or models.grid.largest.name], branch), config.data.max_pixels
    if wanted.subnet or wanted.branch:
        raise UserError("this is one model, not a run", str(wanted.path), "leave out --subnet and --branch")
    return directory_target(wanted.path), MAX_PIXELS


def _digest(model: nn.Module) -> str:
    """Of names and values of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Take a new or empty folder, or one that a like command has begun.

    The identity stands in the manifest from the start, so that parts of something else are never taken for these.
    """
    with writable_folder(out, "choose another --out"):
        path = out / MANIFEST
        if path.exists():
            old = read_json(path, "choose another --out")
            differs = next((key for key, value in identity.items() if old.get(key) != value), None)
            if differs:
                raise UserError(
                    f"it holds features with another value of {differs!r}", str(out), "choose another --out"
                )
            return
        if any(not ASIDE.fullmatch(path.name) for path in out.iterdir()):
            raise UserError("the folder is not empty and no features of ours", str(out), "choose another --out")
        write_atomically(path, json.dumps(identity, indent=1) + "\n")


@torch.inference_mode()
def both_features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By name of tensor, fp32 `[B, D]`: what timm pools for its classifier (the class token, where there is one), and
    the mean over the patches, or cells, of the last map."""
    timm_model = cast(Any, model)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        features = timm_model.forward_features(images)
        pooled = timm_model.forward_head(features, pre_logits=True)
    if features.ndim == 3:
        patches = features[:, getattr(timm_model, "num_prefix_tokens", 0) :].float().mean(1)
    else:
        last = getattr(timm_model, "output_fmt", "NCHW") == "NHWC"
        patches = features.float().mean((1, 2) if last else (2, 3))
    return {"cls": pooled.float(), "patch_mean": patches}


def _features(
    model: nn.Module, images: EvalImages, wanted: Wanted, device: torch.device, threads: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and what stands beside them."""
    names = KINDS[wanted.kind]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    skipped: Counter[str] = Counter()
    records, labels = [], []
    for batch in batches(_Pictures(images), range(len(images)), BATCH_SIZE, threads, skipped, wanted.progress):
        x = images.normalize(torch.stack([image for _, (_, image) in batch]).to(device))
        features = both_features(model, x)
        for name in names:
            found[name].append(features[name].cpu())
            require_finite(found[name][-1], str(wanted.path))
        records += [record for record, _ in batch]
        labels += [label for _, (label, _) in batch]
    if not records:
        raise UserError("no image can be used", str(images.dataset.paths[0]), "leave the shard out")
    keys = keys_of(images.dataset)
    beside: dict[str, Any] = {"keys": [keys[record] for record in records], "labels": labels, "records": records}
    beside["skipped"] = dict(skipped)
    return {name: torch.cat(parts) for name, parts in found.items()}, beside


def part_name(number: int) -> str:
    return f"part-{number:06d}"


def _write(wanted: Wanted, number: int, shard: str, made: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """The tensors first, then the JSON that vouches for them."""
    tensors, beside = made
    name = part_name(number)
    if wanted.format == "safetensors":
        _place(wanted.out / f"{name}.safetensors", lambda aside: save_tensors(tensors, aside))
        files = [f"{name}.safetensors"]
    else:
        for kind, tensor in tensors.items():
            _place(wanted.out / f"{name}.{kind}.npy", partial(_save_array, tensor.numpy()))
        files = [f"{name}.{kind}.npy" for kind in tensors]
    entry = {
        "shard": shard,
        "samples": len(beside["keys"]),
        "widths": {kind: tensor.shape[1] for kind, tensor in tensors.items()},
        "files": {file: sha256(wanted.out / file) for file in files},
        **beside,
    }
    write_atomically(wanted.out / f"{name}.json", json.dumps(entry) + "\n")


def _place(path: Path, write: Callable[[Path], None]) -> None:
    with put_in_place(path) as aside:
        write(aside)


def _save_array(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
    sync(path)


def _part(out: Path, number: int) -> dict[str, Any]:
    return read_json(out / f"{part_name(number)}.json", "remove it and run the command again")


def _is_whole(out: Path, number: int, shard: str) -> bool:
    try:
        part = _part(out, number)
        return part["shard"] == shard and all(sha256(out / file) == digest for file, digest in part["files"].items())
    except (OSError, UserError, KeyError):
        return False


def read_part(out: Path, number: int, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Features `[N, D]` of one kind, and the JSON beside them."""
    part = _part(out, number)
    if f"{part_name(number)}.safetensors" in part["files"]:
        from safetensors.numpy import load_file

        return load_file(out / f"{part_name(number)}.safetensors")[kind], part
    return np.load(out / f"{part_name(number)}.{kind}.npy"), part
