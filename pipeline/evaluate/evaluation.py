"""One evaluation: targets, their features, and what a classifier makes of them."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.eval_images import EvalImages
from pipeline.data.homes import known_classes
from pipeline.data.intake import MAX_PIXELS
from pipeline.data.labels import Numbering, common_numbering
from pipeline.data.patterns import Shards, name_shards, patterns_of
from pipeline.data.reader import Dataset
from pipeline.elastic import Subnet
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.features import LabelledFeatures, extract_features
from pipeline.evaluate.knn import knn_accuracy
from pipeline.evaluate.linear import linear_accuracy, warn_of_edge
from pipeline.evaluate.segmentation import Segmentation
from pipeline.evaluate.spread import decoding_threads, device_of, everywhere, number, sum_counts, total
from pipeline.evaluate.targets import PIXELS, UNTRAINED, Target, directory_target, is_run, pixels_target, run_target
from pipeline.files import one_at_a_time, require_writable, write_atomically
from pipeline.models.loading import RunModels, run_config
from pipeline.models.results import Results, read_results

_GROUP_BYTES = 4 << 30
QUALITIES = ("accuracy", "miou", "knn_accuracy", "knn_miou")
"""What is compared with the untrained network, of what an entry has."""


@dataclass(frozen=True)
class Evaluation:
    """How and on what to evaluate.

    Attributes:
        method: "knn" or "linear".
        train, val: labelled shards.
        ranks: processes that share the work; None for this one alone.
        progress: show progress bars.
        max_pixels: larger images are left out.
        alive: called whenever it got on.
    """

    method: str
    train: Shards
    val: Shards
    ranks: Ranks | None = None
    progress: bool = False
    max_pixels: int = MAX_PIXELS
    alive: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return device_of(self.ranks)

    def numbering(self) -> Numbering:
        """The classes of both sets of shards, by name if they have names.

        Raises:
            UserError: a shard is missing, or validation has classes that training lacks.
        """
        return common_numbering(name_shards(self.train), name_shards(self.val), known_classes)

    def run(self, target: Target) -> Results:
        """Results by name of candidate.

        Raises:
            UserError: a shard is missing, none of its samples is usable, or their classes differ.
        """
        return {name: entry for group in self.groups(target) for name, entry in group.items()}

    def groups(self, target: Target) -> Iterator[Results]:
        """The same, a group of candidates at a time: as many as fit into memory with their features.

        Raises:
            UserError: see `run`.
        """

        def open_images() -> list[EvalImages]:
            numbering, intake = self.numbering(), target.intake._replace(max_pixels=self.max_pixels)
            return [EvalImages(shards, target.preprocessing, intake, numbering) for shards in (self.train, self.val)]

        images = everywhere(self.ranks, open_images)
        threads = decoding_threads(self.ranks)
        held = -(-sum(map(len, images)) // (self.ranks.world_size if self.ranks else 1))
        for group in target.groups(held, _GROUP_BYTES):
            models = {candidate.name: candidate.load() for candidate in group}
            train, val = (
                extract_features(
                    models,
                    source,
                    ranks=self.ranks,
                    device=self.device,
                    threads=threads,
                    progress=self.progress,
                    alive=self.alive,
                    gather=False,
                )
                for source in images
            )
            counts = [
                _require_samples(share, source.dataset, self.ranks)
                for share, source in zip((train, val), images, strict=True)
            ]
            skipped = [sum_counts(share.skipped, self.ranks) for share in (train, val)]
            results: Results = {}
            for candidate in group:
                score = self._classify(candidate.name, train, val)
                self.alive()
                results[candidate.name] = {
                    **score,
                    "train_images": counts[0],
                    "val_images": counts[1],
                    "skipped": {"train": skipped[0], "val": skipped[1]},
                    "params": candidate.params,
                    "gflops": candidate.gflops,
                    **candidate.origin,
                }
            yield results

    def _classify(self, name: str, train: LabelledFeatures, val: LabelledFeatures) -> dict[str, Any]:
        x, queries = train.features[name], val.features[name]
        if name == PIXELS:
            mean = total(x.sum(0).to(self.device), self.ranks).cpu() / number(len(x), self.ranks)
            x, queries = x - mean, queries - mean
        together: Any = {"ranks": self.ranks, "device": self.device}
        if self.method == "linear":
            found = linear_accuracy(x, train.labels, queries, val.labels, records=train.records, **together)
            if self.ranks is None or self.ranks.is_main:
                warn_of_edge(name, "C", found["C"], found["grid_edge"])
            return found
        return knn_accuracy(x, train.labels, queries, val.labels, **together)


@dataclass(frozen=True)
class Request:
    """What `evaluate` is asked for.

    Attributes:
        path: a run directory, or a directory that timm can load.
        method: "knn", "linear" or "segment".
        train, val: shards with labels or masks; a run's own eval.train (data.train) and eval.val (data.val) by default.
        subnets: names, "all", or None for the smallest, the largest and the paper's sizes.
        branch: "teacher" or "student" of a run, the teacher if None.
        untrained: add `untrained_accuracy`, of the same architectures as the run initialised them.
        pixels: add `pixels_accuracy`, of raw 32 x 32 pixels less their mean.
        resume: take what the run's file holds of the same checkpoint and data, and evaluate the rest.
    """

    path: Path
    method: str = "knn"
    train: Shards | None = None
    val: Shards | None = None
    subnets: Iterable[str | Subnet] | str | None = None
    branch: str | None = None
    untrained: bool = False
    pixels: bool = False
    resume: bool = False


def evaluate(request: Request, ranks: Ranks | None = None, progress: bool = False) -> Results:
    """Quality of frozen features: of sub-networks of a run, or of one model directory.

    Results of a run are also written to `RUN/eval/METHOD.json`, beside earlier ones of the same checkpoint and data,
    after every group of networks that fits into memory.

    Args:
        request: of what, and on what.
        ranks: processes that call this together and share the work.
        progress: show progress bars on standard error.

    Returns:
        By name: accuracy (a fraction of 1; of pixels, where masks are judged), what the method adds, train_images,
        val_images, params, gflops, ...

    Raises:
        UserError: the path, a sub-network or the shards are not usable.
    """
    evaluation, target = everywhere(ranks, lambda: _prepare(request, ranks, progress))
    if isinstance(evaluation, Evaluation):
        warn_of_doubt(evaluation)
    data = {"train": patterns_of(evaluation.train), "val": patterns_of(evaluation.val)}
    path = request.path / "eval" / f"{request.method}.json"
    keeps = is_run(request.path) and (ranks is None or ranks.is_main)
    if keeps:
        _warn_if_not_kept(request.path)
    results: Results = {}
    if request.resume and is_run(request.path):
        identity = {**target.candidates[0].origin, **data}
        known = ranks.agree(lambda: read_results(path)) if ranks else read_results(path)
        results = _same(known, identity)
        results = {c.name: results[c.name] for c in target.candidates if c.name in results}
        target = Target([c for c in target.candidates if c.name not in results], target.preprocessing, target.intake)
    for found in evaluation.groups(target) if target.candidates else ():
        trained = {name: entry | data for name, entry in found.items() if not name.startswith(UNTRAINED)}
        results |= trained
        for name, entry in found.items():
            if name.startswith(UNTRAINED):
                of_trained = results[name.removeprefix(UNTRAINED)]
                of_trained |= {f"untrained_{key}": entry[key] for key in QUALITIES if key in entry}
        if keeps and trained:
            _record(path, trained)
    if request.pixels and isinstance(evaluation, Evaluation):
        yardstick = evaluation.run(pixels_target(target.intake))[PIXELS]["accuracy"]
        for entry in results.values():
            entry["pixels_accuracy"] = yardstick
    if keeps and (request.untrained or request.pixels):
        _record(path, results)
    return results


def warn_of_doubt(evaluation: Evaluation) -> None:
    """Say, once and not once per rank, if classes cannot be compared by name.

    Raises:
        UserError: see `Evaluation.numbering`; on every rank alike.
    """
    doubt = everywhere(evaluation.ranks, evaluation.numbering).doubt
    if doubt and (evaluation.ranks is None or evaluation.ranks.is_main):
        print(f"warning: {doubt}", file=sys.stderr)


def _prepare(request: Request, ranks: Ranks | None, progress: bool) -> tuple[Evaluation | Segmentation, Target]:
    path, train, val = request.path, request.train, request.val
    if not is_run(path):
        if request.subnets is not None or request.untrained or request.branch:
            fix = "leave out --subnets, --untrained and --branch"
            raise UserError("this is one model, not a run", str(path), fix)
        return _judge(request.method, *_shards(train, val), ranks, progress), directory_target(path)
    config = run_config(path)
    shards = _shards(train, val, config.eval.train or config.data.train, config.eval.val or config.data.val)
    branch = request.branch or "teacher"
    target = run_target(RunModels.open(path, branch), request.subnets, branch)
    if request.untrained:
        same = [candidate.name for candidate in target.candidates]
        fresh = run_target(RunModels.untrained(config, path), same, branch)
        target = Target([*target.candidates, *fresh.candidates], target.preprocessing, target.intake)
    return _judge(request.method, *shards, ranks, progress, config.data.max_pixels), target


def _judge(method: str, *others: Any) -> Evaluation | Segmentation:
    return Segmentation(*others) if method == "segment" else Evaluation(method, *others)


def _shards(
    train: Shards | None, val: Shards | None, own_train: Shards | None = None, own_val: Shards | None = None
) -> tuple[Shards, Shards]:
    return _named("train", train or own_train), _named("val", val or own_val)


def _named(name: str, shards: Shards | None) -> Shards:
    if not shards:
        raise UserError(f"no {name} shards are named", f"--{name}", f"name labelled shards, or set eval.{name}")
    return shards


def _require_samples(features: LabelledFeatures, dataset: Dataset, ranks: Ranks | None) -> int:
    """How many samples the ranks have together. Collective."""
    count, skipped = number(len(features.labels), ranks), sum_counts(features.skipped, ranks)
    if not count:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(
            f"no labelled image can be used ({reasons})", str(dataset.paths[0]), "name shards with .cls members"
        )
    return count


def _record(path: Path, results: Results) -> None:
    """Add results to a file; older ones of another checkpoint or other data would mislead and go.

    The results are on their way to whoever asked: a file that cannot be written costs a warning.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with one_at_a_time(path.parent):
            try:
                old = read_results(path)
            except UserError as error:
                print(f"warning: {error.what} and is written anew ({path})", file=sys.stderr)
                old = {}
            kept = _same(old, next(iter(results.values())))
            write_atomically(path, json.dumps(kept | results, indent=1) + "\n")
    except OSError as error:
        print(f"warning: the results are not kept in {path}: {error.strerror}", file=sys.stderr)


def _same(results: Results, of: dict[str, Any]) -> Results:
    """The results that are of the same checkpoint and data."""
    identity = ("step", "branch", "train", "val")
    return {name: entry for name, entry in results.items() if all(entry.get(key) == of[key] for key in identity)}


def _warn_if_not_kept(run: Path) -> None:
    """Say before the work that its results will only be printed."""
    folder = run / "eval"
    try:
        require_writable(folder if folder.exists() else run, "")
    except UserError as error:
        print(f"warning: {error.what} ({error.where}): results will be printed, not kept", file=sys.stderr)
