"""A contact sheet: what an experiment makes of its first images before the network sees them."""

from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.config import CacheConfig, DataConfig, ExperimentConfig
from pipeline.data.intake import Intake, settle_values
from pipeline.data.loader import Loader
from pipeline.data.masks import block_masks
from pipeline.data.reading import Reading
from pipeline.data.stream import Skip
from pipeline.elastic import Grid
from pipeline.report.charts import table
from pipeline.report.pictures import SIDE, as_colours, darkened, picture
from pipeline.report.template import page_of

IMAGES = 8
_SPREAD = 3  # deviations on either side of the mean that a channel's grey picture shows


def contact_sheet(config: ExperimentConfig, name: str) -> str:
    """The page as HTML that loads nothing from anywhere: the first images of rank 0 at the first step.

    Args:
        name: of the experiment.

    Raises:
        UserError: shards are missing, damaged, or without statistics that are wanted.
    """
    config = settle_values(config)
    count = min(IMAGES, config.data.batch_size)
    data = config.data.model_copy(update={"batch_size": count, "threads": 1, "lanes": 1, "cache": CacheConfig()})
    skips: list[Skip] = []
    loader = Loader(data, channels=config.model.in_chans, on_skip=skips.append)
    try:
        batch = next(loader)
        globals_, locals_ = batch.global_crops.clone(), batch.local_crops.clone()
    finally:
        loader.close()
    names = _names(data, loader)
    intake, local = loader.intake, data.local_crops.count
    masks = _masks(config, len(globals_))
    crops, covered, channels = [], [], []
    for i, key in enumerate(names):
        pair = globals_[2 * i : 2 * i + 2]
        strip = [picture(as_colours(crop, intake)) for crop in pair]
        strip += [picture(as_colours(crop, intake), SIDE // 2) for crop in locals_[local * i : local * (i + 1)]]
        crops.append(_row(key, strip))
        dark = zip(pair, masks[2 * i : 2 * i + 2], strict=True)
        covered.append(_row(key, [picture(darkened(as_colours(crop, intake), mask)) for crop, mask in dark]))
        channels.append(_row(key, [picture(_grey(channel)) for channel in pair[0]]))
    share = masks.reshape(len(masks), -1).mean(1)
    sections = {
        "Images": _about(config, intake, loader),
        "Crops": "<p>Two global crops, then the local ones.</p>" + "".join(crops),
        "Masks": f"<p>Of the patches of each global crop, from epoch {config.loss.ibot_start_epoch:g} on: "
        f"{', '.join(f'{part:.0%}' for part in share)}.</p>" + "".join(covered),
        "Channels": f"<p>Of the first global crop, normalised: black is {_SPREAD} deviations below the mean, white as "
        "many above.</p>" + "".join(channels),
        "Values": _values(intake, globals_),
        "Left out": _left_out(skips),
    }
    return page_of(name, "Contact sheet", "What the model sees", sections)


def _names(data: DataConfig, loader: Loader) -> list[str]:
    """Key and shard of the first images."""
    dataset = loader.dataset
    reading = Reading(data, dataset=dataset, intake=loader.intake)
    records = [picked.record for picked in reading.pick(reading.positions(0).tolist())]
    reading.close()
    return [f"{dataset.key(record)} ({dataset.shard(record).name})" for record in records]


def _masks(config: ExperimentConfig, crops: int) -> np.ndarray:
    """Bool `[crops, rows, columns]`, as the first step draws them once iBOT is active."""
    loss = config.loss
    side = config.data.global_crops.size // config.model.stride
    grid = (side, side)
    drawn = block_masks(
        config.data.seed, 0, 0, 2 * config.data.batch_size, grid, loss.mask_probability, loss.mask_ratio
    )
    return drawn[:crops].reshape(crops, *grid)


def _row(key: str, pictures: list[str]) -> str:
    return f'<h3>{escape(key)}</h3><div class="strip">{"".join(pictures)}</div>'


def _grey(channel: Tensor) -> Tensor:
    """`[S, S]` normalised -> `[3, S, S]` in 0..1."""
    return (channel.float() / (2 * _SPREAD) + 0.5).clamp(0, 1).expand(3, -1, -1)


def _about(config: ExperimentConfig, intake: Intake, loader: Loader) -> str:
    kind = "8-bit RGB"
    if intake.value_range is not None:
        low, high = intake.value_range
        kind = f"{intake.channels} channels, values from {low:g} to {high:g}"
    rows = [
        ["images", f"{loader.samples} of {len(loader.dataset.paths)} shards"],
        ["read as", kind],
        ["global crops", f"{config.data.global_crops.size} px of {list(config.data.global_crops.scale)} of the area"],
        [
            "local crops",
            f"{config.data.local_crops.count} of {config.data.local_crops.size} px of "
            f"{list(config.data.local_crops.scale)}",
        ],
        ["patches", f"stride {config.model.stride} px"],
        ["networks", f"{config.model.family}, {len(Grid(config.model))} sub-networks"],
    ]
    return table(["", ""], rows)


def _values(intake: Intake, crops: Tensor) -> str:
    """How the values are normalised, and what that comes to in these crops."""
    measured = crops.float().transpose(0, 1).flatten(1)
    rows = [
        [str(channel + 1), f"{mean:.4g}", f"{std:.4g}", f"{values.mean():.2f}", f"{values.std():.2f}"]
        for channel, (mean, std, values) in enumerate(zip(intake.mean, intake.std, measured, strict=True))
    ]
    head = ["channel", "mean", "deviation", "mean of these crops, normalised", "their deviation"]
    return table(head, rows) + "<p>A mean far from 0 or a deviation far from 1 asks for other statistics.</p>"


def _left_out(skips: list[Skip]) -> str:
    if not skips:
        return "<p>None of these images.</p>"
    return table(["key", "shard", "reason"], [[skip.key, Path(skip.shard).name, skip.reason] for skip in skips])
