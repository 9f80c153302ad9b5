"""The proof of an extraction: the model, loaded back through timm, computes what its sub-network computes in place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from pipeline.config import ExperimentConfig
from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage
from pipeline.data.intake import Intake
from pipeline.data.patterns import Shards
from pipeline.elastic import Subnet
from pipeline.errors import UserError
from pipeline.measure.provenance import code_revision
from pipeline.models.loading import RunModels, load_directory
from pipeline.models.timm_format import preprocessing

TOLERANCE = 1e-5


class ProofFailed(Exception):  # noqa: N818 - named for what happened
    """An extracted model does not compute what its sub-network computes in place."""


@dataclass(frozen=True)
class ProofImages:
    """Real images on which a proof rests: fp32 `[N, C, S, S]`, where they come from, and how many were unusable."""

    images: Tensor
    shards: list[str]
    skipped: int


def load_proof_images(config: ExperimentConfig, shards: Shards, count: int) -> ProofImages:
    """Images spread evenly over shards, at the training size, as timm prepares them for evaluation.

    Raises:
        UserError: a shard is missing, or holds no usable image.
    """
    source = EvalImages(shards, preprocessing(config), Intake.of_experiment(config))
    loaded: list[Tensor] = []
    skipped = 0
    step = max(len(source) // max(count, 1), 1)
    by_turns = (record for start in range(step) for record in range(start, len(source), step))
    for record in by_turns:
        if len(loaded) == count:
            break
        try:
            loaded.append(source.load(record))
        except BadImage:
            skipped += 1
    if not loaded:
        raise UserError(
            "no usable image to prove the extraction with", str(source.dataset.paths[0]), "set --proof-shards"
        )
    return ProofImages(source.normalize(torch.stack(loaded)), [path.name for path in source.dataset.paths], skipped)


def identity(models: RunModels, subnet: Subnet, branch: str) -> dict[str, Any]:
    """What tells a model from every other that could bear its name."""
    return {"subnet": subnet.name, "branch": branch, "step": models.step, "checkpoint_sha256": models.fingerprint}


def largest_difference(models: RunModels, subnet: Subnet, directory: Path, images: ProofImages) -> float:
    """Largest |difference| between the pooled features of a model on disk, loaded by timm, and of `subnet` in place."""
    model = load_directory(directory)
    with torch.inference_mode():
        return (model(images.images) - models.backbone(images.images, subnet).cls).abs().max().item()


def proof_of(models: RunModels, subnet: Subnet, branch: str, images: ProofImages, difference: float) -> dict[str, Any]:
    return {
        "max_abs_difference": difference,
        "tolerance": TOLERANCE,
        "images": len(images.images),
        "skipped_images": images.skipped,
        "shards": images.shards,
        "image_sizes": [models.config.model.image_size],
        "precision": "fp32",
        **identity(models, subnet, branch),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "code": code_revision()},
    }
