"""Maps of features of masked images, and what fraction of each cell's pixels has which class.

Letters: N images, S side of an image in pixels, h and w cells of a map, D channels, C classes.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.masked_images import IGNORED, MaskedImages
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.features import batches, require_finite

_BATCH = 16


class DenseFeatures(NamedTuple):
    """Of this rank's images.

    Attributes:
        maps: fp32 `[N, h, w, D]` on the CPU.
        masks: uint8 `[N, S, S]`.
        records: `[N]` their numbers in the shards.
        largest: the largest class in them with the record that has it; (-1, -1) if there is none.
        skipped: images left out, by reason.
    """

    maps: Tensor
    masks: Tensor
    records: Tensor
    largest: tuple[int, int]
    skipped: Counter[str]


@torch.inference_mode()
def feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """The last map of features, `[B, h, w, D]` fp32, of normalised images, after the network's last norm.

    Raises:
        UserError: timm knows no map of this model.
    """
    timm_model = cast(Any, model)
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            maps = timm_model.forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
    except AttributeError as error:
        name = type(model).__name__
        raise UserError(f"{name} has no maps of features in timm", "model", "evaluate another model") from error
    return maps[-1].permute(0, 2, 3, 1).float()


def dense_features(
    model: nn.Module,
    images: MaskedImages,
    *,
    ranks: Ranks | None,
    device: torch.device,
    threads: int,
    progress: bool,
    alive: Callable[[], None],
) -> DenseFeatures:
    """Run a frozen model over this rank's share of the samples; no collective.

    Raises:
        UserError: a mask cannot be used, the model has no maps, or some are not finite.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    model.to(device).eval()
    skipped: Counter[str] = Counter()
    maps, masks, records, largest = [], [], [], (-1, -1)
    for batch in batches(images, range(rank, len(images), world_size), _BATCH, threads, skipped, progress):
        x = images.normalize(torch.stack([sample.image for _, sample in batch]).to(device))
        maps.append(feature_map(model, x).cpu())
        require_finite(maps[-1], "model")
        masks += [sample.mask for _, sample in batch]
        records += [record for record, _ in batch]
        largest = max([largest, *((sample.largest, record) for record, sample in batch)])
        alive()
    if not maps:  # fewer images than ranks: the others must know the shape all the same
        shape = feature_map(model, torch.zeros(1, 3, images.side, images.side, device=device)).shape[1:]
        maps, masks = [torch.empty(0, *shape)], [torch.empty(images.side, images.side, dtype=torch.uint8)]
        return DenseFeatures(maps[0], masks[0][None][:0], torch.empty(0, dtype=torch.int64), largest, skipped)
    return DenseFeatures(torch.cat(maps), torch.stack(masks), torch.tensor(records), largest, skipped)


def cell_counts(masks: Tensor, rows: int, columns: int, classes: int) -> Tensor:
    """Pixels of each class in each cell of a map, fp32 `[N, h, w, C]`; those to be ignored are in none.

    Args:
        masks: uint8 `[N, S, S]`.
        rows, columns: h and w.
        classes: C.
    """
    count, height, width = masks.shape
    row = torch.arange(height, device=masks.device) * rows // height
    column = torch.arange(width, device=masks.device) * columns // width
    cell = torch.arange(count, device=masks.device)[:, None, None] * rows * columns + row[:, None] * columns + column
    known = masks != IGNORED
    place = cell[known] * classes + masks[known].long()
    return torch.bincount(place, minlength=count * rows * columns * classes).view(count, rows, columns, classes).float()


def confusion(scores: Tensor, masks: Tensor) -> Tensor:
    """`[C, C]` pixels by true class and by the class of the highest score, the scores interpolated to the mask.

    Args:
        scores: `[B, h, w, C]`.
        masks: uint8 `[B, S, S]`.
    """
    classes = scores.shape[-1]
    wide = F.interpolate(scores.permute(0, 3, 1, 2), size=masks.shape[1:], mode="bilinear", align_corners=False)
    known = masks != IGNORED
    place = masks[known].long() * classes + wide.argmax(1)[known]
    return torch.bincount(place, minlength=classes * classes).view(classes, classes)


class Quality(NamedTuple):
    """Attributes: miou (mean over the classes that occur or are predicted), accuracy (of pixels), iou (per class; None
    for one that neither occurs nor is predicted)."""

    miou: float
    accuracy: float
    iou: list[float | None]


def quality(counts: Tensor) -> Quality:
    """What a confusion matrix says."""
    counts = counts.double().cpu()
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
    known = [value for value in iou if value is not None]
    return Quality(sum(known) / max(len(known), 1), float(right.sum() / counts.sum().clamp(min=1)), iou)
