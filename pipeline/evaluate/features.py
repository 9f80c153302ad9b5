"""Pooled features of labelled shards by one or many frozen models; every image is decoded once per group of models."""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage
from pipeline.data.progress import progress_bar
from pipeline.engine.distributed import Ranks

BATCH_SIZE = 64


class LabelledFeatures(NamedTuple):
    """Features of all ranks' samples, in the order of the shards.

    Attributes:
        features: per model, fp32 `[N, D]` on the CPU.
        labels: int64 `[N]`.
        skipped: samples left out, by reason.
    """

    features: dict[str, Tensor]
    labels: Tensor
    skipped: Counter[str]


class _Loaded(NamedTuple):
    record: int
    label: int
    image: Tensor


def extract_features(
    models: Mapping[str, nn.Module],
    images: EvalImages,
    *,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    threads: int = 2,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> LabelledFeatures:
    """Run frozen models over the labelled samples of some shards.

    The features are timm's pooled ones, before any classifier. On a GPU they are computed under bf16 autocast.

    Args:
        models: timm modules (or any that map images to features) by name; they are moved to `device`.
        images: the samples, prepared for all of these models alike.
        ranks: share the samples out over these processes; all get the result.
        device: where to compute.
        threads: that decode images.
        batch_size: images per forward pass.
        progress: show a progress bar on standard error.
        alive: called after every batch.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    device = torch.device(device)
    records = range(rank, len(images), world_size)
    skipped: Counter[str] = Counter()
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    seen: list[int] = []
    labels: list[int] = []
    for model in models.values():
        model.to(device).eval()
    for batch in _batches(images, records, batch_size, threads, skipped, progress):
        x = images.normalize(torch.stack([sample.image for sample in batch]).to(device))
        for name, model in models.items():
            parts[name].append(pooled(model, x).cpu())
        seen += [sample.record for sample in batch]
        labels += [sample.label for sample in batch]
        alive()
    own = {name: torch.cat(part) if part else torch.empty(0, 0) for name, part in parts.items()}
    return _gather(own, seen, labels, skipped, ranks)


@torch.inference_mode()
def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """Features `[B, D]` fp32 of normalised images, as timm pools them for its classifier."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        if hasattr(model, "forward_head"):
            timm_model = cast(Any, model)
            return timm_model.forward_head(timm_model.forward_features(images), pre_logits=True).float()
        return model(images).float()


def _batches(
    images: EvalImages, records: Sequence[int], size: int, threads: int, skipped: Counter[str], progress: bool
) -> Iterator[list[_Loaded]]:
    """Usable samples in order, `size` at a time; the others are counted in `skipped` and the first is named."""
    bar = progress_bar(progress, total=len(records), unit="image")
    batch: list[_Loaded] = []
    with bar, ThreadPoolExecutor(threads) as pool:
        for record, outcome in _in_order(pool, images, records, ahead=2 * size):
            bar.update()
            if isinstance(outcome, _Loaded):
                batch.append(outcome)
            else:
                if outcome not in skipped:
                    shard, key = images.dataset.shard(record), images.dataset.key(record)
                    print(f"warning: left out {key} of {shard} ({outcome})", file=sys.stderr)
                skipped[outcome] += 1
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _in_order(
    pool: ThreadPoolExecutor, images: EvalImages, records: Iterable[int], ahead: int
) -> Iterator[tuple[int, _Loaded | str]]:
    """Each record with its sample, or the reason why there is none; at most `ahead` are held."""
    remaining = iter(records)
    running: deque[tuple[int, Future[_Loaded | str]]] = deque()
    while True:
        for record in islice(remaining, ahead - len(running)):
            running.append((record, pool.submit(_load, images, record)))
        if not running:
            return
        record, future = running.popleft()
        yield record, future.result()


def _load(images: EvalImages, record: int) -> _Loaded | str:
    try:
        return _Loaded(record, images.label(record), images.load(record))
    except BadImage as error:
        return error.reason


def _gather(
    own: dict[str, Tensor], seen: list[int], labels: list[int], skipped: Counter[str], ranks: Ranks | None
) -> LabelledFeatures:
    if ranks is None or ranks.world_size == 1:
        return LabelledFeatures(own, torch.tensor(labels, dtype=torch.int64), skipped)
    shares = ranks.gather((seen, labels, skipped))
    order = torch.tensor([record for share in shares for record in share[0]], dtype=torch.int64).argsort()
    all_labels = torch.tensor([label for share in shares for label in share[1]], dtype=torch.int64)
    features = {}
    for name in own:
        parts = [part for part in ranks.gather(own[name]) if len(part)]
        features[name] = torch.cat(parts)[order] if parts else own[name]
    return LabelledFeatures(features, all_labels[order], sum((share[2] for share in shares), Counter()))
