"""Are the shards there, and their images sound?"""

import os

from pipeline.config import ExperimentConfig
from pipeline.data.decoders import check
from pipeline.data.homes import known_classes
from pipeline.data.images import BadImage
from pipeline.data.indexes import indexing
from pipeline.data.intake import Intake, settle_values
from pipeline.data.labels import common_numbering
from pipeline.data.mixing import ROWS
from pipeline.data.patterns import name_shards
from pipeline.data.reader import Dataset
from pipeline.errors import UserError
from pipeline.plan.check import Check

_SAMPLES = 64  # images that are decoded, spread over the shards


def check_shards(config: ExperimentConfig, world_size: int) -> Check:
    """Are the shards there, indexed, and enough for the ranks?"""

    dataset = Dataset(config.data.train, image=config.data.image)
    bare = dataset.without_index
    _require_evaluation(config)
    batch = config.data.batch_size * world_size
    finding = f"{len(dataset.paths)} shards, {len(dataset)} images, global batch {batch}"
    if dataset.sources[0].name:
        parts = (f"{source.name} {source.samples} images, {source.share / ROWS:.1%}" for source in dataset.sources)
        finding += f" ({'; '.join(parts)})"
    if len(dataset) < batch:
        return Check("shards", "fail", finding, "lower data.batch_size, or use fewer ranks")
    if bare:
        return Check("shards", "warn", f"{finding}; {len(bare)} have no index", f"{indexing(bare[0])} ...")
    if world_size > len(dataset.paths):
        fix = "many ranks read from one file at a time: build more, smaller shards (poa shards build --per-shard)"
        return Check("shards", "warn", f"{finding}; fewer shards than {world_size} ranks", fix)
    cores = len(os.sched_getaffinity(0))
    if config.data.threads > cores:
        return Check(
            "shards", "warn", f"{finding}; {config.data.threads} threads on {cores} cores", "lower data.threads"
        )
    return Check("shards", "pass", finding)


def _require_evaluation(config: ExperimentConfig) -> None:
    """Raise what the k-NN during training would end with at its start."""
    if config.eval.every_steps is None:
        return
    train, val = config.eval.train or config.data.train, config.eval.val or config.data.val
    if val is None:
        raise UserError("there is nothing to evaluate on", "eval.val", "name labelled shards, or unset every_steps")
    common_numbering(name_shards(train), name_shards(val), known_classes)
    for shards in (train, val):
        Dataset(shards, image=config.data.image)


def check_images(config: ExperimentConfig) -> Check:
    """Can images from all over the shards be decoded?"""

    intake = Intake.of_experiment(settle_values(config))
    dataset = Dataset(config.data.train, image=intake.image)
    count = min(_SAMPLES, len(dataset))
    bad: dict[int, str] = {}
    for record in (i * len(dataset) // count for i in range(count)):
        try:
            data = dataset.image(record)
            if intake.is_rgb:
                check(bytes(data), intake.max_pixels)
            else:
                intake.open(data)
        except BadImage as error:
            bad[record] = error.reason
    finding = f"{count - len(bad)} of {count} images are sound"
    if not bad:
        return Check("images", "pass", finding)
    record, reason = next(iter(bad.items()))
    finding += f"; {dataset.key(record)} of {dataset.shard(record)}: {reason}"
    fix = f"poa shards verify {dataset.shard(record)}; training leaves bad images out and counts them"
    return Check("images", "fail" if len(bad) > count / 2 else "warn", finding, fix)
