"""`poa eval`: arguments and table; importing this module loads nothing heavy."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.distributed import Ranks

_METHODS = {
    "knn": "20-nearest-neighbour accuracy (cosine, weights exp(similarity / 0.07))",
    "linear": "accuracy of a linear probe, regularisation chosen on a held-out fifth of the training samples",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa eval`."""
    methods = parser.add_subparsers(metavar="METHOD", required=True)
    for method, text in _METHODS.items():
        sub = methods.add_parser(method, help=text, description=text)
        sub.add_argument("path", metavar="RUN|MODEL_DIR", help="run directory, or a directory that timm can load")
        sub.add_argument("--train", metavar="SHARDS", nargs="+", help="labelled shards; default: the run's")
        sub.add_argument("--val", metavar="SHARDS", nargs="+", help="labelled shards; default: the run's")
        sub.add_argument("--subnets", metavar="NAME,...|all", nargs="+", help="default: smallest, largest, paper's")
        sub.add_argument("--branch", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
        sub.add_argument("--untrained", action="store_true", help="also the same networks before training")
        sub.add_argument("--pixels", action="store_true", help="also raw 32x32 pixels, as a yardstick")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        sub.set_defaults(run=run, method=method)


def run(args: argparse.Namespace) -> int:
    """Run `poa eval METHOD`, on one process or under torchrun or srun on many."""
    from pipeline.evaluate.job import evaluate

    names = [name for word in args.subnets or () for name in word.split(",") if name]
    with _launched_ranks() as ranks:
        main = ranks is None or ranks.is_main
        results = evaluate(
            args.path,
            args.method,
            train=args.train,
            val=args.val,
            subnets=None if args.subnets is None else names,
            branch=args.branch,
            untrained=args.untrained,
            pixels=args.pixels,
            ranks=ranks,
            progress=main and not args.json,
        )
    if main:
        print(json.dumps(results) if args.json else table(results, args.method))
    return 0


@contextmanager
def _launched_ranks() -> "Iterator[Ranks | None]":
    """The ranks that torchrun or Slurm started; None if this process is alone."""
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) == 1:
        yield None
        return
    from pipeline import distributed

    ranks = distributed.initialize()
    try:
        with distributed.crash_together(ranks):
            yield ranks
    finally:
        distributed.shut_down()


def table(results: dict[str, dict[str, Any]], method: str) -> str:
    """Results as lines of text, accuracies in percent."""
    first = next(iter(results.values()))
    title = {"knn": f"{first.get('neighbours')}-NN", "linear": "linear"}[method]
    columns = {f"{title} %": "accuracy", "top-5 %": "top5", "untrained %": "untrained_accuracy"}
    columns = {head: key for head, key in columns.items() if key in first}
    width = max(len("model"), *map(len, results))
    lines = [f"{'model':<{width}}  {'M params':>9}  {'GFLOPs':>8}" + "".join(f"  {head:>11}" for head in columns)]
    for name, entry in results.items():
        cells = "".join(f"  {100 * entry[key]:>11.1f}" for key in columns.values())
        lines.append(f"{name:<{width}}  {entry['params'] / 1e6:>9.2f}  {entry['gflops']:>8.3g}{cells}")
    if "pixels_accuracy" in first:
        lines.append(f"{'pixels':<{width}}  {'':>9}  {'':>8}  {100 * first['pixels_accuracy']:>11.1f}")
    lines.append(f"{first['train_images']} training and {first['val_images']} validation images{_skipped(first)}")
    return "\n".join(lines)


def _skipped(entry: dict[str, Any]) -> str:
    parts = [f"{count} {reason} in {name}" for name, by in entry["skipped"].items() for reason, count in by.items()]
    return f"; left out: {', '.join(parts)}" if parts else ""
