"""Pictures of a run: crops as the model saw them, and what its features see in images."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor

from pipeline.config import CacheConfig, ExperimentConfig
from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage
from pipeline.data.intake import Intake
from pipeline.data.loader import Loader
from pipeline.data.masks import block_masks
from pipeline.data.segments import segment_at
from pipeline.elastic import Subnet, build
from pipeline.evaluate.online import representative_subnets
from pipeline.models.loading import RunModels
from pipeline.models.timm_format import preprocessing

IMAGES = 4
SIDE = 128
_MASKED = 0.15  # brightness left under a mask


def crops_as_seen(config: ExperimentConfig, step: int, world_size: int, run: Path) -> str:
    """Crops of the first images of rank 0 at a step, with the masks laid over them, as HTML.

    Raises:
        UserError: the shards are not there any more.
    """
    batch = config.data.batch_size
    count = min(IMAGES, batch)
    read = count if config.data.lanes == 1 else batch  # which of a batch are first, only the whole batch tells
    data = config.data.model_copy(update={"batch_size": read, "threads": 1, "cache": CacheConfig()})
    sample = step * batch * world_size
    loader = Loader(
        data,
        world_size=world_size,
        start_sample=sample,
        segment=segment_at(run, sample),
        channels=config.model.in_chans,
    )
    try:
        crops = next(loader)
        globals_, locals_ = crops.global_crops.clone(), crops.local_crops.clone()
    finally:
        loader.close()
    rows, columns = build(config.model).patch_grid(config.data.global_crops.size)
    loss = config.loss
    masks = np.zeros((2 * count, rows, columns), dtype=bool)
    if step >= loss.ibot_start_epoch * config.optim.steps_per_epoch and loss.ibot_weight > 0:
        drawn = block_masks(
            config.data.seed, step, 0, 2 * batch, (rows, columns), loss.mask_probability, loss.mask_ratio
        )
        masks = drawn[: 2 * count].reshape(2 * count, rows, columns)
    per_image = len(locals_) // read
    globals_, locals_ = as_colours(globals_, loader.intake), as_colours(locals_, loader.intake)
    strips = []
    for i in range(count):
        strip = [picture(darkened(globals_[2 * i + g], masks[2 * i + g])) for g in range(2)]
        strip += [picture(locals_[i * per_image + j], SIDE // 2) for j in range(per_image)]
        strips.append(f'<div class="strip">{"".join(strip)}</div>')
    return "".join(strips)


@torch.no_grad()
def patch_components(config: ExperimentConfig, models: RunModels) -> str:
    """First three principal components of the teacher's patch features as colours, per size, as HTML.

    Raises:
        UserError: the shards are not there any more.
    """
    shards = config.eval.val or config.data.val or config.data.train
    prepared = resolve_data_config({}, pretrained_cfg=preprocessing(config))
    images = _some_images(EvalImages(shards, prepared, Intake.of_experiment(config)))
    if not len(images[0]):
        return ""
    shown, inputs = images
    strips = [_strip("image", [picture(x) for x in shown])]
    for subnet in representative_subnets(models.grid):
        strips.append(_strip(subnet.name, [picture(x) for x in _components(models, inputs, subnet)]))
    return "".join(strips)


def _some_images(source: EvalImages) -> tuple[Tensor, Tensor]:
    """A few usable images, spread over the set: in [0, 1], and as the model takes them."""
    held: list[Tensor] = []
    for record in range(0, len(source), max(len(source) // (4 * IMAGES), 1)):
        try:
            held.append(source.load(record))
        except BadImage:
            continue
        if len(held) == IMAGES:
            break
    channels = source.intake.channels
    normalized = source.normalize(torch.stack(held) if held else torch.empty(0, channels, 1, 1))
    return as_colours(normalized, source.intake), normalized


def _components(models: RunModels, images: Tensor, subnet: Subnet) -> Tensor:
    """`[B, 3, rows, columns]` in [0, 1]."""
    patches = models.backbone(images, subnet).patches
    rows, columns = models.backbone.patch_grid(images.shape[-1])
    flat = patches.reshape(-1, patches.shape[-1]).double()
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    colours = flat @ axes[:3].T
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.reshape(len(images), rows, columns, -1).permute(0, 3, 1, 2).float()


def darkened(crop: Tensor, mask: np.ndarray) -> Tensor:
    size = crop.shape[-1]
    grown = np.kron(mask, np.ones((size // mask.shape[0], size // mask.shape[1]), dtype=bool))
    return torch.where(torch.from_numpy(grown), _MASKED * crop, crop)


def as_colours(images: Tensor, intake: Intake) -> Tensor:
    """Colours `[..., 3, H, W]` in 0..1 of normalised images `[..., C, H, W]`: one channel grey, else the first."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (intake.mean, intake.std))
    values = (images.float() * std + mean).clamp(0, 1)
    if intake.channels == 2:
        values = torch.cat([values, values[..., :1, :, :] * 0], -3)
    return values.expand(*values.shape[:-3], 3, -1, -1) if intake.channels == 1 else values[..., :3, :, :]


def picture(image: Tensor, side: int = SIDE) -> str:
    """An `<img>` with the picture in it, `[3, H, W]` in 0..1."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{side}" height="{side}" alt="" src="data:image/png;base64,{text}">'


def _strip(name: str, pictures: list[str]) -> str:
    return f'<div class="strip"><span>{escape(name)}</span>{"".join(pictures)}</div>'
