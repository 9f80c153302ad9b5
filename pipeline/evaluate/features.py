"""Pooled features of labelled shards by one or many frozen models; every image is decoded once per group of models."""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage
from pipeline.data.progress import progress_bar
from pipeline.data.reader import Dataset
from pipeline.data.reading import REQUESTS
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.spread import everywhere

BATCH_SIZE = 64
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class LabelledFeatures(NamedTuple):
    """Features of samples, in the order of the shards.

    Attributes:
        features: per model, fp32 `[N, D]` on the CPU.
        labels: int64 `[N]`.
        skipped: samples left out, by reason.
        records: int64 `[N]`, their numbers in the shards.
    """

    features: dict[str, Tensor]
    labels: Tensor
    skipped: Counter[str]
    records: Tensor


class Samples(Protocol[S_co]):
    """What can be read record by record."""

    @property
    def dataset(self) -> Dataset: ...

    def sample(self, record: int) -> S_co:
        """Raises BadImage: it cannot be used, for the reason given."""


class Loaded(NamedTuple, Generic[S]):
    """A record and what `Samples.sample` made of it."""

    record: int
    sample: S


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
    gather: bool = True,
) -> LabelledFeatures:
    """Run frozen models over the labelled samples of some shards.

    The features are timm's pooled ones, before any classifier. On a GPU they are computed under bf16 autocast.

    Args:
        models: timm modules (or any that map images to features) by name; they are moved to `device`.
        images: the samples, prepared for all of these models alike.
        ranks: share the samples out over these processes.
        device: where to compute.
        threads: that decode images.
        batch_size: images per forward pass.
        progress: show a progress bar on standard error.
        alive: called after every batch.
        gather: give every rank the features of all; else each keeps those of its own samples.

    Raises:
        UserError: on every rank, if some features are not finite.
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
    for batch in batches(images, records, batch_size, threads, skipped, progress):
        x = images.normalize(torch.stack([image for _, (_, image) in batch]).to(device))
        for name, model in models.items():
            parts[name].append(pooled(model, x).cpu())
        seen += [record for record, _ in batch]
        labels += [label for _, (label, _) in batch]
        alive()
    own = {name: _joined(part, ranks) for name, part in parts.items()}
    for name, features in own.items():
        everywhere(ranks, partial(require_finite, features, name))
    kept = LabelledFeatures(own, _integers(labels), skipped, _integers(seen))
    return _gather(kept, ranks) if gather and ranks and ranks.world_size > 1 else kept


def require_finite(features: Tensor, name: str) -> None:
    """Refuse what would be evaluated to a number all the same: among NaN the first neighbour is as good as any.

    Raises:
        UserError: a value of the features of the model `name` is not finite.
    """
    if not features.isfinite().all():
        fix = "its weights diverged or are damaged: take those of another checkpoint, or extract it again"
        raise UserError("features that are not finite", name, fix)


@torch.inference_mode()
def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """Features `[B, D]` fp32 of normalised images, as timm pools them for its classifier."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        if hasattr(model, "forward_head"):
            timm_model = cast(Any, model)
            return timm_model.forward_head(timm_model.forward_features(images), pre_logits=True).float()
        return model(images).float()


def batches(
    images: Samples[S], records: Sequence[int], size: int, threads: int, skipped: Counter[str], progress: bool
) -> Iterator[list[Loaded[S]]]:
    """Usable samples in order, `size` at a time; the others are counted in `skipped` and the first is named."""
    bar = progress_bar(progress, total=len(records), unit="image")
    batch: list[Loaded[S]] = []
    if images.dataset.is_remote:
        threads = max(threads, REQUESTS)  # which wait more than they compute
    with bar, ThreadPoolExecutor(threads) as pool:
        for record, outcome in _in_order(pool, images, records, ahead=2 * size):
            bar.update()
            if isinstance(outcome, Loaded):
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
    pool: ThreadPoolExecutor, images: Samples[S], records: Iterable[int], ahead: int
) -> Iterator[tuple[int, Loaded[S] | str]]:
    """Each record with its sample, or the reason why there is none; at most `ahead` are held."""
    remaining = iter(records)
    running: deque[tuple[int, Future[Loaded[S] | str]]] = deque()
    while True:
        for record in islice(remaining, ahead - len(running)):
            running.append((record, pool.submit(_load, images, record)))
        if not running:
            return
        record, future = running.popleft()
        yield record, future.result()


def _load(images: Samples[S], record: int) -> Loaded[S] | str:
    try:
        return Loaded(record, images.sample(record))
    except BadImage as error:
        return error.reason


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _joined(parts: list[Tensor], ranks: Ranks | None) -> Tensor:
    """One tensor of this rank's batches; one without samples learns from the others how wide they are. Collective."""
    width = parts[0].shape[1] if parts else 0
    widest = max(ranks.gather(width)) if ranks else width
    return torch.cat(parts) if parts else torch.empty(0, widest)


def _gather(own: LabelledFeatures, ranks: Ranks) -> LabelledFeatures:
    """The features of all ranks, on each of them."""
    shares = ranks.gather(own._replace(features={}))
    records = torch.cat([share.records for share in shares])
    order = records.argsort()
    features = {name: torch.cat(ranks.gather(part))[order] for name, part in own.features.items()}
    skipped = sum((share.skipped for share in shares), Counter[str]())
    return LabelledFeatures(features, torch.cat([share.labels for share in shares])[order], skipped, records[order])
