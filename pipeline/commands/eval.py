"""`poa eval METHOD`: quality of frozen features, on one process or under torchrun or srun on many."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.distributed import Ranks

from pipeline.commands.arguments import add_json, path
from pipeline.commands.imports import heavy_imports

HELP = "k-NN or linear accuracy, or segmentation, of sub-networks"
_METHODS = {
    "knn": "20-nearest-neighbour accuracy (cosine, weights exp(similarity / 0.07))",
    "linear": "accuracy of a linear probe, regularisation chosen on a held-out fifth of the training samples",
    "segment": "mIoU and pixel accuracy of linear and 30-NN segmentation on maps of features (shards with KEY.seg.png)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa eval`."""
    methods = parser.add_subparsers(metavar="METHOD", required=True)
    for method, text in _METHODS.items():
        sub = methods.add_parser(method, help=text, description=text)
        kind = "masked" if method == "segment" else "labelled"
        sub.add_argument(
            "path", metavar="RUN|MODEL_DIR", type=path, help="run directory, or a directory that timm can load"
        )
        sub.add_argument("--train", metavar="SHARDS", type=path, nargs="+", help=f"{kind} shards; default: the run's")
        sub.add_argument("--val", metavar="SHARDS", type=path, nargs="+", help=f"{kind} shards; default: the run's")
        sub.add_argument("--subnets", metavar="NAME,...|all", nargs="+", help="default: smallest, largest, paper's")
        sub.add_argument("--branch", choices=("teacher", "student"), help="of a run; default: teacher")
        sub.add_argument("--untrained", action="store_true", help="also the same networks before training")
        if method != "segment":
            sub.add_argument("--pixels", action="store_true", help="also raw 32x32 pixels, as a yardstick")
        add_json(sub)
        sub.set_defaults(method=method, pixels=False)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    with heavy_imports():
        from pipeline.evaluate.evaluation import Request, evaluate
        from pipeline.evaluate.table import table

    names = [name for word in args.subnets or () for name in word.split(",") if name]
    request = Request(
        Path(args.path),
        args.method,
        train=args.train,
        val=args.val,
        subnets=None if args.subnets is None else names,
        branch=args.branch,
        untrained=args.untrained,
        pixels=args.pixels,
    )
    with launched_ranks() as ranks:
        main = ranks is None or ranks.is_main
        results = evaluate(request, ranks, progress=main and not args.json)
    if main:
        print(json.dumps(results) if args.json else table(results, args.method))
    return 0


@contextmanager
def launched_ranks() -> "Iterator[Ranks | None]":
    """The ranks that torchrun or Slurm started; None if this process is alone."""
    from pipeline.engine.launch import launch

    if launch().world_size == 1:
        yield None
        return
    from pipeline.engine import distributed

    ranks = distributed.initialize()
    try:
        with distributed.crash_together(ranks):
            yield ranks
    finally:
        distributed.shut_down()
