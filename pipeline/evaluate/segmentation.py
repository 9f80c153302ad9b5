"""Linear and k-NN segmentation on frozen maps of features; the protocol is written down in docs/choosing.md.

Letters: N images, h and w cells of a map, D channels, C classes, L learning rates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.intake import MAX_PIXELS
from pipeline.data.masked_images import CLASSES, MaskedImages, require_same_classes
from pipeline.data.patterns import Shards
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.dense import DenseFeatures, Quality, cell_counts, confusion, dense_features, quality
from pipeline.evaluate.linear import edge, held_out, warn_of_edge
from pipeline.evaluate.neighbours import Bank
from pipeline.evaluate.spread import decoding_threads, device_of, everywhere, number, sum_counts, total
from pipeline.evaluate.targets import Candidate, Target
from pipeline.models.results import Results

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # on whitened features
BATCH, MOMENTUM, LEAST_STEPS, EPOCHS = 32, 0.9, 500, 10
NEIGHBOURS, TEMPERATURE = 30, 0.02
BANK = 1 << 20
"""Cells that k-NN knows at most."""
_SIMILARITIES = 1 << 26
_IMAGES = 16  # judged at a time
_ROWS = 1 << 16  # in fp64 at a time
_NOTHING = 1e-6  # of the largest variance: a direction of less is rounding


@dataclass(frozen=True)
class Segmentation:
    """Which masked images to learn from and to judge by.

    Attributes:
        train, val: shards with masks.
        ranks: processes that share the work; None for this one alone.
        progress: show progress bars.
        max_pixels: larger images are left out.
        alive: called whenever it got on.
    """

    train: Shards
    val: Shards
    ranks: Ranks | None = None
    progress: bool = False
    max_pixels: int = MAX_PIXELS
    alive: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return device_of(self.ranks)

    def groups(self, target: Target) -> Iterator[Results]:
        """Results by name of candidate, one candidate at a time. Collective.

        Raises:
            UserError: shards, masks or classes are not usable; on every rank alike.
        """

        def open_images() -> tuple[MaskedImages, MaskedImages]:
            train, val = (
                MaskedImages(shards, target.preprocessing, target.intake._replace(max_pixels=self.max_pixels))
                for shards in (self.train, self.val)
            )
            if train.classes and val.classes:
                require_same_classes(train.classes, val.classes, Path(val.dataset.paths[0]).parent / CLASSES)
            return train, val

        images = everywhere(self.ranks, open_images)
        threads = decoding_threads(self.ranks)
        for candidate in target.candidates:
            yield {candidate.name: self._entry(candidate, images, threads)}

    def _entry(self, candidate: Candidate, images: tuple[MaskedImages, MaskedImages], threads: int) -> dict[str, Any]:
        def look(source: MaskedImages) -> DenseFeatures:
            return dense_features(
                model,
                source,
                ranks=self.ranks,
                device=self.device,
                threads=threads,
                progress=self.progress,
                alive=self.alive,
            )

        model = everywhere(self.ranks, candidate.load)
        train, val = (everywhere(self.ranks, partial(look, source)) for source in images)
        classes = self._classes(images, train, val)
        counts = [self._images(share, source) for share, source in zip((train, val), images, strict=True)]
        probe = Probe(train, classes, self.ranks, self.device)
        if self.ranks is None or self.ranks.is_main:
            warn_of_edge(candidate.name, "learning rate", probe.learning_rate, probe.edge)
        linear = self._judge(val, classes, probe.scores)
        self.alive()
        knn = self._knn(train, val, classes)
        names = images[0].classes or [str(i) for i in range(classes)]
        return {
            "accuracy": linear.accuracy,
            "miou": linear.miou,
            "iou": dict(zip(names, linear.iou, strict=True)),
            "knn_accuracy": knn.accuracy,
            "knn_miou": knn.miou,
            "learning_rate": probe.learning_rate,
            "grid_edge": probe.edge,
            "input_pixels": images[0].side,
            "map_cells": list(train.maps.shape[1:3]),
            "train_images": counts[0],
            "val_images": counts[1],
            "skipped": {
                "train": sum_counts(train.skipped, self.ranks),
                "val": sum_counts(val.skipped, self.ranks),
            },
            "params": candidate.params,
            "gflops": candidate.gflops,
            **candidate.origin,
        }

    def _images(self, share: DenseFeatures, source: MaskedImages) -> int:
        count = number(len(share.records), self.ranks)
        if not count:
            raise UserError("no image can be used", str(source.dataset.paths[0]), "name other shards")
        return count

    def _classes(self, images: tuple[MaskedImages, MaskedImages], *shares: DenseFeatures) -> int:
        """How many classes there are: as many as have names, else up to the largest that the training masks hold."""
        found = [max(self.ranks.gather(share.largest)) if self.ranks else share.largest for share in shares]
        names = images[0].classes
        classes = len(names) if names else found[0][0] + 1
        said = f"{CLASSES} names {classes}" if names else f"the training masks hold none beyond {classes - 1}"
        if not classes:
            raise UserError("the training masks hold no class", str(images[0].dataset.paths[0]), "name other shards")
        if found[1][0] < 0:
            raise UserError("the validation masks hold no class", str(images[1].dataset.paths[0]), "name other shards")
        for (largest, record), source in zip(found, images, strict=True):
            if largest >= classes:
                what = f"the mask of {source.dataset.key(record)} holds class {largest}, and {said}"
                fix = f"mend the masks, or write {CLASSES} beside the training shards"
                raise UserError(what, str(source.dataset.shard(record)), fix)
        return classes

    def _judge(self, val: DenseFeatures, classes: int, scores: Callable[[Tensor], Tensor]) -> Quality:
        """Of scores `[B, h, w, C]` of maps `[B, h, w, D]`, over all ranks."""
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        for maps, masks in zip(val.maps.split(_IMAGES), val.masks.split(_IMAGES), strict=True):
            if len(maps):
                counts += confusion(scores(maps.to(self.device)), masks.to(self.device))
        return quality(total(counts, self.ranks))

    def _knn(self, train: DenseFeatures, val: DenseFeatures, classes: int) -> Quality:
        rows, columns = train.maps.shape[1:3]
        shares = cell_counts(train.masks, rows, columns, classes).flatten(0, 2)
        kept = self._kept(train, rows * columns) & (shares.sum(1) > 0)
        shares = F.normalize(shares[kept], p=1, dim=1).to(self.device)
        bank = Bank(train.maps.flatten(0, 2)[kept], self.ranks, self.device)

        def vote(similarity: Tensor, nearest: Tensor) -> Tensor:
            weights = ((similarity - 1) / TEMPERATURE).exp()
            return torch.einsum("qk,qkc->qc", weights, shares[nearest])

        count = min(NEIGHBOURS, bank.size)
        at_once = max(_SIMILARITIES // max(bank.size, count * classes), 1)
        votes = [part.cpu() for part in bank.ask(val.maps.flatten(0, 2), count, vote, at_once)]
        scores = torch.cat(votes) if votes else torch.empty(0, classes)
        voted = val._replace(maps=F.normalize(scores, p=1, dim=1).view(-1, rows, columns, classes))
        return self._judge(voted, classes, lambda maps: maps)

    def _kept(self, train: DenseFeatures, cells: int) -> Tensor:
        """Which cells enter the bank, `[N h w]`: all, or as many of each image, drawn by its record."""
        images = number(len(train.records), self.ranks)
        each = min(max(BANK // images, 1), cells)
        kept = torch.zeros(len(train.records), cells, dtype=torch.bool)
        for row, record in zip(kept, train.records.tolist(), strict=True):
            row[torch.randperm(cells, generator=torch.Generator().manual_seed(record))[:each]] = True
        return kept.flatten()


class Probe:
    """Linear classifiers of single cells, one per learning rate, trained side by side; the best on held-out images.

    Args:
        train: this rank's images.
        classes: C.
        ranks: processes that hold the others.
        device: where to train, that of the ranks.

    Attributes:
        learning_rate: of the chosen one.
        edge: whether that is the "smallest" or "largest" there is, and better than its neighbour.
    """

    def __init__(self, train: DenseFeatures, classes: int, ranks: Ranks | None, device: torch.device):
        self._ranks, self._device, self._classes = ranks, device, classes
        apart = held_out(train.records, ranks)
        if not number(int((~apart).sum()), ranks) or not number(int(apart.sum()), ranks):
            apart = torch.zeros_like(apart)  # too few images: choose by those that were fitted
        fitted = [part[~apart] for part in (train.maps, train.masks, train.records)]
        chooser = fitted if not number(int(apart.sum()), ranks) else [part[apart] for part in (train.maps, train.masks)]
        self._whiten(fitted[0])
        self._weight = torch.zeros(len(LEARNING_RATES), train.maps.shape[-1] + 1, classes, device=device)
        self._fit(*fitted)
        scores = self._choices(*chooser[:2])
        self._best = max(range(len(scores)), key=scores.__getitem__)
        self.learning_rate = LEARNING_RATES[self._best]
        self.edge = edge(scores)

    def scores(self, maps: Tensor) -> Tensor:
        """`[B, h, w, D]` on the device -> `[B, h, w, C]` of the chosen classifier."""
        return self._logits(maps)[self._best]

    def _logits(self, maps: Tensor) -> Tensor:
        x = (maps - self._mean) @ self._whitening
        weight = self._weight
        return torch.einsum("nhwd,ldc->lnhwc", x, weight[:, :-1]) + weight[:, -1][:, None, None, None]

    def _whiten(self, maps: Tensor) -> None:
        """Mean, and the symmetric map by which features are uncorrelated and of unit variance.

        A linear classifier can say the same of them, but SGD gets along as fast in every direction. The features of a
        network are far from that: correlations whose eigenvalues span four orders of magnitude and more were seen, so
        that most directions had learnt nothing when the steps were over, whatever the learning rate.
        """
        parts = maps.flatten(0, 2).split(_ROWS)
        count, width = number(sum(map(len, parts)), self._ranks), maps.shape[-1]
        mean = torch.zeros(width, dtype=torch.float64, device=self._device)
        products = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        for part in parts:
            mean += part.to(self._device).double().sum(0)
        mean = total(mean, self._ranks) / count
        for part in parts:
            x = part.to(self._device).double() - mean
            products += x.T @ x
        variances, directions = torch.linalg.eigh(total(products, self._ranks) / count)
        known = variances > _NOTHING * variances[-1].clamp(min=_NOTHING)
        self._mean = mean.float()
        self._whitening = (directions * variances.rsqrt().where(known, 0.0) @ directions.T).float()

    def _fit(self, maps: Tensor, masks: Tensor, records: Tensor) -> None:
        """SGD over batches of images of all ranks; a batch does not depend on which rank holds what."""
        everything = torch.cat(self._ranks.gather(records)) if self._ranks else records
        everything = everything.sort().values
        place = {record: i for i, record in enumerate(records.tolist())}
        steps = max(LEAST_STEPS, math.ceil(EPOCHS * len(everything) / BATCH))
        rates = torch.tensor(LEARNING_RATES, device=self._device)[:, None, None]
        velocity = torch.zeros_like(self._weight)
        queue: list[int] = []
        draw = torch.Generator().manual_seed(0)
        for step in range(steps):
            while len(queue) < min(BATCH, len(everything)):
                queue += everything[torch.randperm(len(everything), generator=draw)].tolist()
            batch, queue = queue[:BATCH], queue[BATCH:]
            own = [place[record] for record in batch if record in place]
            gradient = self._gradient(maps[own], masks[own])
            velocity = MOMENTUM * velocity + gradient
            self._weight -= 0.5 * (1 + math.cos(math.pi * step / steps)) * rates * velocity

    def _gradient(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Of the cross-entropy per known pixel of a batch, over all ranks, `[L, D + 1, C]`.

        A cell's pixels have the same features, so that their counts by class are all that the loss needs.
        """
        weight = self._weight.requires_grad_()
        counts = cell_counts(masks.to(self._device), maps.shape[1], maps.shape[2], self._classes)
        loss = -(counts * self._logits(maps.to(self._device)).log_softmax(-1)).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
        packed = total(torch.cat([gradient.flatten(), counts.sum()[None]]), self._ranks)
        return packed[:-1].view_as(gradient) / packed[-1].clamp(min=1)

    def _choices(self, maps: Tensor, masks: Tensor) -> list[float]:
        """mIoU of each classifier; -1 for one that ran away."""
        counts = torch.zeros(len(LEARNING_RATES), self._classes, self._classes, dtype=torch.int64, device=self._device)
        for x, y in zip(maps.split(_IMAGES), masks.split(_IMAGES), strict=True):
            for i, logits in enumerate(self._logits(x.to(self._device)) if len(x) else ()):
                counts[i] += confusion(logits, y.to(self._device))
        counts = total(counts, self._ranks)
        finite = self._weight.flatten(1).isfinite().all(1).tolist()
        return [quality(each).miou if good else -1.0 for each, good in zip(counts, finite, strict=True)]
