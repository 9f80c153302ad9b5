"""From paths and limits to the networks that fit, the best of them and how sure that is."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.patterns import list_shards
from pipeline.data.reader import Dataset
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.evaluation import Request, Shards, evaluate
from pipeline.evaluate.targets import is_run
from pipeline.evaluate.unlabelled import unlabelled_scores
from pipeline.models.loading import open_heads, run_config
from pipeline.models.proof import load_proof_images
from pipeline.select.choice import QUALITIES, Limits, Network, fits, front, on_any_front, ranked, require_fit
from pipeline.select.correlation import Correlation, spearman
from pipeline.select.latency import Machine
from pipeline.select.sources import Source, open_sources
from pipeline.select.times import PredictionError, Times, copied

SLACK = 1.15
"""Networks whose predicted latency is within this factor of the limit are evaluated; timing them decides."""
_AT_A_TIME = 8
_PASSES = 6
_LOOKED_AT = 20  # samples in which labels are sought


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        paths: run directories, and directories that timm can load.
        limits: largest value by key of `COSTS`.
        machine: where latencies are taken.
        quality: key of `QUALITIES`; None for k-NN where there are labels, else agreement with the teacher.
        train, val: labelled shards; a run's own by default. Label-free scores take images of `val`.
        branch: "teacher" or "student" of runs, the teacher if None.
        label_free: add the label-free scores, and how they rank the networks against `quality`.
        images: of the label-free scores.
        timed: whether latencies are wanted without a limit on them.
        progress: show progress bars.
    """

    paths: Sequence[Path]
    limits: Limits
    machine: Machine
    quality: str | None = None
    train: Shards | None = None
    val: Shards | None = None
    branch: str | None = None
    label_free: bool = False
    images: int = 512
    timed: bool = True
    progress: bool = False


@dataclass
class Selection:
    """The answer.

    Attributes:
        wanted: what was asked for.
        quality: the key of `QUALITIES` that ranks.
        networks: all, by source and in the order of the grid.
        about: what the quality rests on, in words.
        error: of predicted latencies; None if none was both predicted and timed.
        correlations: of the label-free scores with `quality`.
    """

    wanted: Wanted
    quality: str
    networks: list[Network]
    about: str = ""
    error: PredictionError | None = None
    correlations: dict[str, Correlation] = field(default_factory=dict)

    @property
    def fitting(self) -> list[Network]:
        return [n for n in self.networks if fits(n, self.wanted.limits) and self.quality in n.quality]

    @property
    def front(self) -> list[Network]:
        """Of those that fit, the ones that no other beats in quality and some cost; best first."""
        return on_any_front(self.fitting, self.quality)

    @property
    def best(self) -> Network:
        return ranked(self.fitting, self.quality)[0]

    def as_json(self) -> dict[str, Any]:
        machine = self.wanted.machine
        return {
            "best": self.best.name,
            "front": [n.name for n in self.front],
            "quality": self.quality,
            "about": self.about,
            "limits": dict(self.wanted.limits),
            "machine": {k: getattr(machine, k) for k in ("device", "threads", "precision", "batch")},
            "prediction_error": self.error._asdict() if self.error else None,
            "rank_correlation": {k: c.as_json() for k, c in self.correlations.items()},
            "networks": [n.as_json() for n in self.networks],
        }


def select(wanted: Wanted, ranks: Ranks | None = None) -> Selection:
    """Choose; collective over `ranks`, of which the first times the networks.

    Raises:
        UserError: a path is no run and no model, shards cannot be used, or no network fits.
    """
    sources = open_sources(wanted.paths, wanted.branch, wanted.machine)
    networks = [network for source in sources for network in source.networks.values()]
    require_fit(networks, wanted.limits)
    quality = wanted.quality or _best_quality(wanted)
    _require_known(quality, sources)
    times = Times(sources, wanted.machine)
    timed = wanted.timed or "seconds" in wanted.limits
    if timed:
        _on_first(ranks, networks, times.begin)
    selection = Selection(wanted, quality, networks)
    near = [n for n in networks if fits(n, wanted.limits, SLACK)]
    if not near:
        require_fit(networks, wanted.limits)
    selection.about = _evaluate(selection, sources, {n.name for n in near}, ranks)
    if timed:
        for _ in range(_PASSES):  # one that turns out to be too slow leaves its place to the next
            possible = [n for n in near if n.timing is None or fits(n, wanted.limits)]
            finalists = front(possible, "seconds", quality)
            unsure = [n.name for n in reversed(finalists) if n.timing is None][:_AT_A_TIME] or times.checks()
            if not unsure:
                break
            _on_first(ranks, networks, partial(times.confirm, unsure))
        require_fit(near, wanted.limits)
        selection.error = times.error
    selection.correlations = _correlations(networks, quality)
    return selection


def _on_first(ranks: Ranks | None, networks: Iterable[Network], act: Callable[[], None]) -> None:
    """Time on one rank; the others learn what it found."""
    if ranks is None:
        act()
        return

    def found() -> dict[str, tuple]:
        act()
        return copied(networks)

    for network, (seconds, timing) in zip(networks, ranks.agree(found).values(), strict=True):
        network.seconds, network.timing = seconds, timing


def _best_quality(wanted: Wanted) -> str:
    """k-NN if every source has labelled shards to go by, else agreement with the teacher."""
    for path in wanted.paths:
        config = run_config(path) if is_run(path) else None
        train = wanted.train or (config and (config.eval.train or config.data.train))
        val = wanted.val or (config and (config.eval.val or config.data.val))
        if not (train and val and _has_labels(train) and _has_labels(val)):
            return "agreement"
    return "knn"


def _has_labels(shards: Shards) -> bool:
    """Whether the first samples of the first shard have any."""
    dataset = Dataset([list_shards(shards)[0]])
    for record in range(min(len(dataset), _LOOKED_AT)):
        with suppress(ValueError):  # there is one, and the evaluation will say what is wrong with it
            if dataset.label(record) is None:
                continue
        return True
    return False


def _require_known(quality: str, sources: Sequence[Source]) -> None:
    rivals = [source.path for source in sources if source.models is None]
    if QUALITIES[quality].label_free and rivals:
        raise UserError(
            f"{QUALITIES[quality].title} says nothing of a model outside of the run",
            str(rivals[0]),
            "compare by --quality knn or linear, with labelled --train and --val",
        )


def _evaluate(selection: Selection, sources: Sequence[Source], names: set[str], ranks: Ranks | None) -> str:
    """Fill in the quality of some networks; what it rests on."""
    wanted, quality = selection.wanted, selection.quality
    about = ""
    for source in sources:
        chosen = [name for name in source.networks if name in names]
        if source.models and chosen and (wanted.label_free or QUALITIES[quality].label_free):
            about = _look(wanted, source, chosen, ranks)
        if chosen and not QUALITIES[quality].label_free:
            about = _classify(wanted, quality, source, chosen, ranks)
    return about


def _classify(wanted: Wanted, quality: str, source: Source, chosen: list[str], ranks: Ranks | None) -> str:
    if source.models:
        subnets = [source.subnets[name] for name in chosen]
        request = Request(source.path, quality, wanted.train, wanted.val, subnets, wanted.branch, resume=True)
    else:
        request = Request(source.path, quality, wanted.train, wanted.val)
    results = evaluate(request, ranks, wanted.progress)
    for name in chosen:
        entry = results[source.subnets[name].name] if source.models else next(iter(results.values()))
        source.networks[name].quality[quality] = entry["accuracy"]
    return f"{entry['train_images']} training and {entry['val_images']} validation images"


def _look(wanted: Wanted, source: Source, chosen: list[str], ranks: Ranks | None) -> str:
    assert source.models is not None
    config = source.models.config
    shards = wanted.val or config.eval.val or config.data.val or config.data.train
    images = load_proof_images(config, shards, wanted.images)
    device = ranks.device if ranks else wanted.machine.device
    scores = unlabelled_scores(
        source.models,
        open_heads(source.path, wanted.branch or "teacher"),
        [source.subnets[name] for name in chosen],
        images.images,
        ranks=ranks,
        device=device,
        progress=wanted.progress,
    )
    source.models.backbone.cpu()
    for name, score in zip(chosen, scores.values(), strict=True):
        source.networks[name].quality |= score._asdict()
    held_out = "" if wanted.val or config.eval.val or config.data.val else " that training has seen"
    return f"{len(images.images)} images{held_out}, no labels"


def _correlations(networks: Sequence[Network], quality: str) -> dict[str, Correlation]:
    found = {}
    for key, kind in QUALITIES.items():
        known = [n for n in networks if quality in n.quality and key in n.quality]
        if kind.label_free and key != quality and not QUALITIES[quality].label_free and len(known) > 1:
            found[key] = spearman([kind.sign * n.quality[key] for n in known], [n.quality[quality] for n in known])
    return found
